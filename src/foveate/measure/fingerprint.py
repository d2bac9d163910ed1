"""What machine a figure comes from: CPU and its instruction sets, threads, memory, GPU, versions.

Only facts that explain a speed are kept; no host name, user name or path.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

# The extensions a kernel of ours or of torch's may choose between, as /proc/cpuinfo spells them.
_ISA_FLAGS = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16",
    "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "sve", "sve2", "bf16",
)  # fmt: skip


@dataclass(frozen=True)
class Fingerprint:
    """One machine and its software; `as_dict()` is what results.json stores."""

    cpu: str
    architecture: str
    isa: tuple[str, ...]
    torch_isa: str
    cores: int
    usable_cores: int
    threads: int
    ram_bytes: int | None
    gpu: str | None
    gpu_memory_bytes: int | None
    cuda: str | None
    os: str
    python: str
    torch: str
    foveate: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "isa": list(self.isa)}

    @property
    def sentence(self) -> str:
        """The machine on one line, for captions."""
        ram = f", {self.ram_bytes / 2**30:.0f} GiB" if self.ram_bytes else ""
        gpu = f", {self.gpu}" if self.gpu else ""
        return f"{self.cpu}, {self.threads} threads{ram}{gpu}, torch {self.torch}, Python {self.python}"


def _proc_cpuinfo() -> tuple[str, set[str]]:
    model, flags = "", set()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return model, flags
    for line in text.splitlines():
        name, _, value = line.partition(":")
        name = name.strip().lower()
        if not model and name in ("model name", "cpu model", "hardware"):
            model = value.strip()
        elif not flags and name in ("flags", "features"):
            flags = set(value.split())
        if model and flags:
            break
    return model, flags


def _cpu_model() -> str:
    model, _ = _proc_cpuinfo()
    if model:
        return model
    if platform.system() == "Darwin":
        try:
            asked = subprocess.run(
                ["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, timeout=5
            )
            model = asked.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            model = ""
    return model or platform.processor() or platform.machine() or "unknown CPU"


def _ram_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:  # a container may be given less than the machine has
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        return min(total, int(limit)) if limit.isdigit() else total
    except OSError:
        return total


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # type: ignore[attr-defined]
    except AttributeError:
        return os.cpu_count() or 1


def fingerprint(device: str | torch.device = "cpu") -> Fingerprint:
    """Describe this machine; the GPU's lines are filled when `device` is one.

    Args:
        device: where the figures are taken.
    """
    from foveate import __version__

    where = torch.device(device)
    gpu = memory = cuda = None
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        capability = f"sm_{properties.major}{properties.minor}"
        gpu, memory, cuda = f"{properties.name} ({capability})", properties.total_memory, torch.version.cuda
    elif where.type != "cpu":
        gpu = where.type
    _, flags = _proc_cpuinfo()
    return Fingerprint(
        cpu=_cpu_model(),
        architecture=platform.machine(),
        isa=tuple(flag for flag in _ISA_FLAGS if flag in flags),
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        threads=torch.get_num_threads(),
        ram_bytes=_ram_bytes(),
        gpu=gpu,
        gpu_memory_bytes=memory,
        cuda=cuda,
        os=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        torch=torch.__version__,
        foveate=__version__,
    )
