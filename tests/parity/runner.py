"""The parity runner: runs an adapter on a golden vector and compares everything the file holds.

The runner, never an adapter, compares. See README.md beside this file for how to write an adapter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from tests.parity.ledger import LEDGER, Entry, find
from tests.parity.vector import REFERENCE, SEED, Vector, read

Adapter = Callable[[Vector], Mapping[str, Tensor]]

HOME = Path(__file__).parents[1] / "golden"
GRADIENT_FACTOR = 5.0
ABSOLUTE = 1e-6
RELATIVE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def golden_directory() -> Path:
    """The directory named by FOVEATE_GOLDEN, else the copies in this repository."""
    return Path(os.environ.get("FOVEATE_GOLDEN") or HOME)


def golden_files() -> list[Path]:
    """Every golden file, sorted."""
    return sorted(golden_directory().glob("*.safetensors"))


def parts_of(key: str) -> dict[str, Adapter]:
    """The adapters of a system: part name or shell pattern -> adapter. Empty when it has none."""
    name = f"tests.parity.adapters.{key}"
    if not key.isidentifier() or find_spec(name) is None:
        return {}
    try:
        return import_module(name).PARTS
    except Exception as broken:
        # One broken adapter must fail its own files, not hide the report on all others.
        return {"": _raising(broken), "*": _raising(broken)}


def _raising(error: Exception) -> Adapter:
    def adapter(vector: Vector) -> Mapping[str, Tensor]:
        raise error

    return adapter


def adapter_for(path: Path) -> Adapter | None:
    """The adapter of a golden file: exact part name first, then patterns in order; None if there is none."""
    key, _, part = path.name.removesuffix(".safetensors").partition(".")
    parts = parts_of(key)
    if part in parts:
        return parts[part]
    return next((fn for pattern, fn in parts.items() if pattern and fnmatchcase(part, pattern)), None)


def split_files() -> tuple[list[Path], list[Path]]:
    """Golden files with an adapter, and those not implemented yet."""
    files = golden_files()
    done = [path for path in files if adapter_for(path)]
    return done, [path for path in files if path not in done]


def check_file(path: Path, ledger: tuple[Entry, ...] = LEDGER) -> list[str]:
    """Run a golden file through its adapter; return one sentence per failure, none when it holds."""
    adapter = adapter_for(path)
    assert adapter is not None, f"{path.name} has no adapter"
    return [failure for vector in read(path) for failure in check(vector, adapter, ledger)]


def check(vector: Vector, adapter: Adapter, ledger: tuple[Entry, ...] = ()) -> list[str]:
    """Run one case; return one sentence per failure, none when it holds."""
    outputs = dict(adapter(vector))
    failures = []
    unknown = sorted(set(outputs) - set(vector.tensors))
    if unknown:
        failures.append(f"{vector.name}: the adapter returned {unknown}, which the file does not hold")
    results = {name: value for name, value in outputs.items() if name in vector.tensors}
    compared = dict(results)
    failures += _backward(vector, results, compared)
    for name, ours in compared.items():
        entry = find(vector.name, name, vector.config, ledger)
        if entry is None or entry.factor is not None:
            sentence = compare(name, ours, vector.tensors[name], entry.factor if entry else 1.0)
            if sentence:
                failures.append(f"{vector.name}: {sentence}")
    excused = {n for n in vector.tensors if find(vector.name, n, vector.config, ledger)}
    for name in sorted(set(vector.tensors) - set(compared) - excused):
        if name.split(".")[0].startswith(REFERENCE):
            failures.append(f"{vector.name}: {name} was not compared")
        elif name not in vector.used:
            failures.append(f"{vector.name}: {name} was not used")
    return failures


def _backward(vector: Vector, results: Mapping[str, Tensor], compared: dict[str, Tensor]) -> list[str]:
    """Run the backward pass and add the gradients the file holds to `compared`."""
    failures, outs, cotangents = [], [], []
    for seed, out in _pairs(vector).items():
        if out not in results:
            failures.append(f"{vector.name}: {seed} belongs to {out}, which the adapter did not return")
            continue
        value = results[out]
        if not value.requires_grad:
            failures.append(f"{vector.name}: {out} has no gradient, yet the file has {seed}")
            continue
        cotangent = vector.take(seed) if vector.has(seed) else torch.ones_like(value)
        if cotangent.shape != value.shape:
            failures.append(f"{vector.name}: {out} is {_shape(value)}, expected {_shape(cotangent)}")
            continue
        outs.append(value)
        cotangents.append(cotangent.to(value.dtype))
    if outs:
        torch.autograd.backward(outs, cotangents)
        # Carries the parameters' gradients back through the adapter's reshapes to the official names.
        loads = [(loaded, p.grad) for loaded, p in vector.loads if p.grad is not None]
        if loads:
            torch.autograd.backward([t for t, _ in loads], [g for _, g in loads])
    for name in vector.tensors:
        leaf = vector.leaves.get(name.removeprefix("grad."))
        if name.startswith("grad.") and leaf is not None and name not in compared:
            compared[name] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return failures


def _pairs(vector: Vector) -> dict[str, str]:
    """Which output each cotangent belongs to: `cotangent.x` to `out.x`, `cotangent` to `out` or `out.out`."""
    pairs = {seed or f"ones for {out}": out for out, seed in vector.seeds.items()}
    for name in vector.tensors:
        if name.split(".")[0] == SEED and name not in pairs:
            out = "out" + name.removeprefix(SEED)
            pairs[name] = "out.out" if out == "out" and not vector.has("out") else out
    return pairs


def compare(name: str, ours: Tensor, reference: Tensor, factor: float = 1.0) -> str | None:
    """Compare one tensor with its reference; return a sentence when they differ.

    Integers and booleans must be equal. A boolean of ours beside a float reference is a mask:
    True must stand exactly where the additive reference is 0.
    """
    ours = ours.detach()
    if ours.dtype == torch.bool and reference.is_floating_point():
        reference = reference == 0
    if ours.shape != reference.shape:
        return f"{name} is {_shape(ours)}, expected {_shape(reference)}"
    if not reference.is_floating_point():
        if ours.is_floating_point():
            return f"{name} is {ours.dtype}, expected {reference.dtype}"
        wrong = int((ours != reference).sum())
        return f"{name} differs in {wrong} of {ours.numel()} entries" if wrong else None
    if not ours.is_floating_point():
        return f"{name} is {ours.dtype}, expected {reference.dtype}"
    a, b = ours.double(), reference.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(
        a[~finite].nan_to_num(), b[~finite].nan_to_num()
    ):
        return f"{name} has NaN or infinity in other places than expected"
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return None
    if name.startswith("grad."):
        factor *= GRADIENT_FACTOR
    allowed = factor * (RELATIVE[reference.dtype] * b.abs().max().item() + ABSOLUTE)
    error = (a - b).abs().max().item()
    return None if error <= allowed else f"{name} differs by {error:.3g}, allowed {allowed:.3g}"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
