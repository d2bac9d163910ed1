"""`foveate doctor`: what this machine and installation can do, and why not more."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, version
from shutil import which

from rich.markup import escape
from rich.table import Table

from foveate.cli.console import friendly, stdout

# Backends of the plan that this version does not have yet.
_PLANNED = {
    "flex": "FlexAttention is not wired up in this version",
    "triton": "its kernels are not part of this version",
}


def extras() -> dict[str, dict[str, str | None]]:
    """Per extra of the package, its distributions and their installed versions (None when missing)."""
    found: dict[str, dict[str, str | None]] = {}
    for line in distribution("foveate").requires or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        name = re.match(r"[\w.-]+", requirement.strip())
        if extra is None or name is None:
            continue
        try:
            installed: str | None = version(name.group())
        except PackageNotFoundError:
            installed = None
        found.setdefault(extra.group(1), {})[name.group()] = installed
    return found


def backends() -> dict[str, str]:
    """Backend -> "" when it can be used here, or the reason it cannot."""
    from foveate.kernels.cpu.library import absent
    from foveate.kernels.select import BACKENDS

    known = {**dict.fromkeys(BACKENDS, ""), **{k: why for k, why in _PLANNED.items() if k not in BACKENDS}}
    return {**known, "cpu": absent() or ""}


def core() -> str:
    """Say which instruction sets the C++ core runs with here, or why there is no core."""
    from foveate.kernels.cpu.library import absent, isa_levels, library_path

    missing = absent()
    if missing is None:
        *slower, best = isa_levels()
        return f"{best}" + (f" (also {', '.join(slower)})" if slower else "") + f", {library_path()}"
    compiler = next(filter(None, map(which, ("c++", "g++", "clang++"))), None)
    return f"{missing}; C++ compiler now: {compiler or 'none'}"


@friendly
def doctor() -> None:
    """Say what this machine and installation can do, and why not more."""
    import torch

    from foveate.core.registry import list_systems
    from foveate.measure.fingerprint import fingerprint

    console = stdout()
    gpu = torch.cuda.is_available()
    machine = fingerprint("cuda" if gpu else "cpu")
    table = Table(show_header=False, box=None, pad_edge=False)

    def row(name: str, said: str) -> None:
        table.add_row(f"[dim]{name}[/]", escape(said))

    row("foveate", f"{machine.foveate}, {len(list_systems())} systems")
    row("python", machine.python)
    row("torch", machine.torch)
    row("system", f"{machine.os}, {machine.architecture}")
    row("cpu", machine.cpu)
    row("isa", f"{' '.join(machine.isa) or 'no known extensions'}; torch uses {machine.torch_isa}")
    row("C++ core", core())
    row(
        "threads",
        f"{machine.threads} of {machine.usable_cores} usable cores ({machine.cores} present)",
    )
    if machine.ram_bytes:
        row("memory", f"{machine.ram_bytes / 2**30:.1f} GiB")
    row("gpu", f"{machine.gpu}, CUDA {machine.cuda}" if gpu else "none: torch sees no CUDA device")
    console.print(table)
    console.print("\n[bold]backends[/]")
    for name, why in backends().items():
        mark = "[green]yes[/]" if not why else "[yellow]no [/]"
        console.print(f"  {mark} {name:10}" + (f" [dim]{escape(why)}[/]" if why else ""))
    console.print("\n[bold]extras[/]")
    for extra, parts in extras().items():
        missing = [name for name, installed in parts.items() if installed is None]
        if missing:
            line = f"pip install 'foveate[{extra}]'"
            said = f"missing {', '.join(missing)}. Run: {escape(line)}"
            console.print(f"  [yellow]no [/] {extra:13} {said}", soft_wrap=True)
        else:
            have = ", ".join(f"{name} {installed}" for name, installed in parts.items())
            console.print(f"  [green]yes[/] {extra:13} [dim]{have}[/]", soft_wrap=True)
