"""What a comparison is asked to do: a frozen record, checked once, written into results.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from foveate.core.dtypes import FLOATS
from foveate.core.errors import bad, unknown
from foveate.core.grid import Grid
from foveate.core.registry import Facts, get_system, list_systems
from foveate.tasks.workload import workload_keys

DEFAULT_WORKLOADS = ("image", "shapes")
BASELINE = "full_attention"
_DTYPES = {str(d).removeprefix("torch."): d for d in FLOATS} | {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The user's own sizes, which the workload `shapes` times.

    Attributes:
        grid: token grid sizes.
        heads, head_dim: attention heads and channels of each; the width is their product.
        batch: samples at once.
    """

    grid: tuple[int, ...] = (64, 64)
    heads: int = 4
    head_dim: int = 64
    batch: int = 1

    def __post_init__(self):
        Grid(*self.grid)
        for name in ("heads", "head_dim", "batch"):
            if getattr(self, name) < 1:
                raise bad(name, getattr(self, name), "a positive integer")

    @property
    def dim(self) -> int:
        """Channels C."""
        return self.heads * self.head_dim

    def ladder(self, sizes: int = 4) -> list[Grid]:
        """Grids from a quarter of each axis up to the whole, for the scaling exponent.

        Sequences start at a sixteenth, so that the number of tokens spans as much as in two dimensions.
        """
        smallest = 16 if len(self.grid) == 1 else 4
        steps = [(1 / smallest) ** (1 - i / (sizes - 1)) for i in range(sizes)]
        found: list[Grid] = []
        for share in steps:
            # Multiples of 8 keep windows and blocks whole; below that there is nothing to keep.
            grid = Grid(*(_round(size * share, size) for size in self.grid))
            if grid not in found:
                found.append(grid)
        return found


def _round(value: float, most: int) -> int:
    if value >= most:
        return most
    unit = 8 if most >= 16 else 1
    return min(most, max(unit, round(value / unit) * unit))


def default_budget(mechanisms: int, workloads: int = len(DEFAULT_WORKLOADS)) -> float:
    """Return seconds in which so many mechanisms can be told apart at all: a quick look, not a study.

    A race needs some tens of steps of everybody. Up to 16 mechanisms and two workloads share four and a half
    minutes, each further one adds some seconds; a third and a fourth workload add half as much again each.
    """
    one = 270.0 + 9.0 * max(0, mechanisms - 16)
    return one * (1.0 + 0.5 * max(0, workloads - 2))


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Return the keys that keys, families and wildcards mean, in the order given, each once.

    Raises:
        UnknownNameError: a name that is none of them; the nearest keys are in the message.
    """
    found: list[str] = []
    for name in names:
        several = list_systems(family=name) or (list_systems(name) if set(name) & set("*?[") else [])
        found += [facts.key for facts in several] or [get_system(name).key]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison.

    Attributes:
        workloads: keys, in the order they run.
        mechanisms: keys, families ("local") or wildcards ("*neighborhood*"), kept as the keys they mean; None
            for every registered one.
        budget_s: seconds for everything; None for `default_budget` of those that take part.
        device, dtype, threads: where and how; threads None leaves torch's choice.
        shape: sizes of the workload `shapes`.
        data: the user's own folder of images or text file, or None.
        seed: of data, parameters and inputs.
        seeds: training seeds of the finalists.
    """

    workloads: tuple[str, ...] = DEFAULT_WORKLOADS
    mechanisms: tuple[str, ...] | None = None
    budget_s: float | None = None
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    shape: Shape = Shape()
    data: str | None = None
    seed: int = 0
    seeds: int = 3

    def __post_init__(self):
        if not self.workloads:
            raise bad("workloads", self.workloads, "at least one workload")
        for key in self.workloads:
            if key not in workload_keys():
                raise unknown("workload", key, [*workload_keys(), "all"])
        if self.mechanisms is not None:
            object.__setattr__(self, "mechanisms", named(self.mechanisms))
        if self.budget_s is None:
            object.__setattr__(self, "budget_s", default_budget(len(self.systems()), len(self.workloads)))
        if not self.seconds > 0:
            raise bad("budget", self.budget_s, "a positive number of seconds")
        if self.dtype not in _DTYPES:
            raise bad("dtype", self.dtype, f"one of {', '.join(sorted(_DTYPES))}")
        if self.threads is not None and self.threads < 1:
            raise bad("threads", self.threads, "a positive integer")
        try:
            kind = torch.device(self.device).type
        except RuntimeError:
            raise bad("device", self.device, "a torch device such as 'cpu' or 'cuda'") from None
        if kind == "cuda" and not torch.cuda.is_available():
            raise bad("device", self.device, "a device of this machine", "torch sees no CUDA device here.")
        if self.data is not None:
            if not Path(self.data).exists():
                raise bad("data", self.data, "an existing folder of images or a text file")
            wanted = ("text",) if Path(self.data).is_file() else ("image", "restore")
            if not set(wanted) & set(self.workloads):
                runs = ", ".join(self.workloads)
                hint = f"Add --workload {wanted[0]}."
                raise bad("data", self.data, f"data of a workload that runs, here {runs}", hint)

    @property
    def seconds(self) -> float:
        """The budget as a number."""
        assert self.budget_s is not None
        return self.budget_s

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of parameters and inputs."""
        return _DTYPES[self.dtype]

    def systems(self) -> list[Facts]:
        """The facts of all that may take part; the dense baseline is always among them."""
        known = {facts.key: facts for facts in list_systems()}
        if self.mechanisms is None:
            return list(known.values())
        chosen = {key: get_system(key) for key in self.mechanisms}
        if BASELINE in known:
            chosen.setdefault(BASELINE, known[BASELINE])
        return list(chosen.values())

    def workload_options(self, key: str) -> dict[str, Any]:
        """Options of `make_workload` for one workload: the user's data where it is of that kind."""
        if self.data is None:
            return {}
        path = Path(self.data)
        if key == "text":
            return {"file": path} if path.is_file() else {}
        return {"folder": path} if path.is_dir() and key in ("image", "restore") else {}

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def conflict(self, stored: dict[str, Any]) -> str:
        """Why a run stored with other settings can't be gone on with, or ""."""
        mine = self.as_dict()
        for name in ("device", "dtype", "threads", "shape", "data", "seed", "seeds"):
            if _listed(mine[name]) != _listed(stored.get(name)):
                return f"it was made with {name}={stored.get(name)!r}, now {name}={mine[name]!r}"
        return ""


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _listed(v) for k, v in value.items()}
    return [_listed(v) for v in value] if isinstance(value, list | tuple) else value


def parse_grid(text: str | Sequence[int]) -> tuple[int, ...]:
    """Read "64x64", "64,64", "4096" or a sequence of sizes.

    Raises:
        ArgumentError: naming `grid`.
    """
    if not isinstance(text, str):
        return Grid.of(text).sizes
    try:
        sizes = tuple(int(part) for part in text.lower().replace("×", "x").replace(",", "x").split("x"))
    except ValueError:
        raise bad("grid", text, "sizes such as 64x64, 4096 or 8x32x32") from None
    return Grid(*sizes).sizes
