"""Is every backend right on this device? Outputs and gradients against the definition in float64 on the CPU.

    python benchmarks/gpu/check.py [--device cuda] [--quick]

The yardstick is what the same mathematics errs when written plainly (`reference`) in the same dtype on the
same device, or a few roundings if that is more: an output may err twice as much, a gradient three times.
Exits with 1 if one errs more, with 2 if there is no such device.
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import Tensor

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.select import BACKENDS
from foveate.measure.fingerprint import fingerprint
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.patterns.grids import Halo, Lattice, Neighborhood, Windows
from foveate.patterns.segments import Segments
from foveate.patterns.specials import with_specials
from foveate.scores.temperature import SoftCap

# Errors below this share of the largest value are rounding, whatever the plain form errs.
FLOOR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def cases(quick: bool) -> dict[str, tuple[object, int, dict]]:
    """Return name -> (where, tokens, further arguments)."""
    side = 8 if quick else 48
    g, n = Grid(side, side), side * side
    packed = torch.arange(3).repeat_interleave(torch.tensor([n // 4, n // 2, n - n // 4 - n // 2]))[None]
    found: dict[str, tuple[object, int, dict]] = {
        "all pairs": (None, n, {}),
        "causal": (Causal(), n, {}),
        "neighborhood": (Neighborhood(g, 5), n, {}),
        "packed causal": (Segments(packed) & Causal(), n, {}),
    }
    if quick:
        return found
    volume = Grid(8, 16, 16)
    return found | {
        "sliding window": (SlidingWindow(63), n, {}),
        "dilated": (Neighborhood(g, 7, dilation=3), n, {}),
        "strided causal": (Neighborhood(g, 8, stride=4, causal=(True, False)), n, {}),
        "3-d": (Neighborhood(volume, (3, 5, 5)), volume.numel, {}),
        "shifted windows": (Windows(g, 8, shift=4), n, {}),
        "halo, zero border": (Halo(g, 8, 2, border="zero"), n, {}),
        "near and far": (Neighborhood(g, 5) | Lattice(g, 6), n, {}),
        "class tokens": (with_specials(Neighborhood(g, 7), 3), n + 3, {}),
        "soft cap": (Neighborhood(g, 7), n, {"score": SoftCap(20.0)}),
    }


def results(leaves: list[Tensor], grad: Tensor, where, backend: str, further: dict) -> list[Tensor]:
    """Return output and gradients of q, k, v in float64 on the CPU."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    where = where.to(grad.device) if hasattr(where, "to") else where
    out = attend(*leaves, where=where, backend=backend, **further)
    return [x.detach().double().cpu() for x in (out, *torch.autograd.grad(out, leaves, grad))]


def errors(got: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Return [error of the output, worst error of a gradient], relative to the largest value."""
    each = [
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in zip(got, truth, strict=True)
    ]
    return [each[0], max(each[1:])]


def check(name: str, case: tuple, device: str, dtype: torch.dtype) -> bool:
    """Check every backend on one problem; returns whether all are right."""
    where, n, further = case
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(2, 4, n, 64, generator=generator, dtype=torch.float64) for _ in range(4)]
    narrow = [x.to(device, dtype) for x in wide]
    # The truth starts from the rounded inputs, so that only the computation is judged.
    exact = [x.double().cpu() for x in narrow]
    truth = results(exact[:3], exact[3], where, "reference", further)
    plain = errors(results(narrow[:3], narrow[3], where, "reference", further), truth)
    right = True
    for backend in BACKENDS:
        line = f"{name:18} {str(dtype).removeprefix('torch.'):9} {backend:10}"
        try:
            found = errors(results(narrow[:3], narrow[3], where, backend, further), truth)
        except UnsupportedError as refusal:
            print(f"{line} refuses: {refusal}")
            continue
        limits = [factor * max(base, FLOOR[dtype]) for factor, base in zip((2, 3), plain, strict=True)]
        good = all(error <= limit for error, limit in zip(found, limits, strict=True))
        right &= good
        shown = ", ".join(
            f"{what} {error:.1e} (plain {base:.1e})"
            for what, error, base in zip(("output", "gradients"), found, plain, strict=True)
        )
        print(f"{line} {'ok   ' if good else 'WRONG'} {shown}", flush=True)
    return right


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="a few small problems in float32")
    options = parser.parse_args(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was checked", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    print(fingerprint(options.device).sentence)
    dtypes = [torch.float32] if options.quick else list(FLOOR)
    found = cases(options.quick)
    right = [check(name, case, options.device, dtype) for name, case in found.items() for dtype in dtypes]
    print(
        "all right" if all(right) else f"{right.count(False)} of {len(right)} problems have a wrong backend"
    )
    return int(not all(right))


if __name__ == "__main__":
    sys.exit(main())
