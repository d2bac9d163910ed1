"""How do `sdpa` and `tiles` stand beside FlexAttention? Ratios of one run, interleaved repeats.

    python benchmarks/gpu/timing.py [--device cuda] [--dtype bfloat16] [--repeats 30] [--quick]

FlexAttention is compiled by torch and gets the pattern's own `mask_mod` as a block mask; making the mask is
not timed. Batch 4, 8 heads, d 64. Medians in milliseconds with the interquartile range; the ratio is
FlexAttention's median over the backend's. A backend whose output is wrong is not timed. Exits with 2 if there
is no such device.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.measure.fingerprint import fingerprint
from foveate.measure.timer import time_interleaved
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.patterns.grids import Neighborhood, Windows
from foveate.patterns.pattern import Pattern

BACKENDS = ("sdpa", "tiles")


def problems(quick: bool) -> dict[str, tuple[Pattern, int]]:
    """Return name -> (pattern, tokens)."""
    if quick:
        return {"16x16 window 5": (Neighborhood(Grid(16, 16), 5), 256)}
    return {
        "causal 4096": (Causal(), 4096),
        "sliding window 512 of 8192": (SlidingWindow(511), 8192),
        "64x64 window 13": (Neighborhood(Grid(64, 64), 13), 4096),
        "64x64 window 16 stride 8": (Neighborhood(Grid(64, 64), 16, stride=8), 4096),
        "128x128 window 15 dilation 2": (Neighborhood(Grid(128, 128), 15, dilation=2), 16384),
        "16x32x32 window 5x9x9": (Neighborhood(Grid(16, 32, 32), (5, 9, 9)), 16384),
        "windows 8 of 64x64": (Windows(Grid(64, 64), 8), 4096),
    }


def calls(where: Pattern, n: int, leaves: list[Tensor], compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """Return name -> call(q, k, v)."""
    device = leaves[0].device
    # Compiled on a GPU only: elsewhere the uncompiled form is there to check this script.
    flex = torch.compile(flex_attention) if compiled else flex_attention
    make = partial(create_block_mask, where.mask_mod, None, None, n, n, device=str(device))
    forms: dict[str, Callable[..., Tensor]] = {"flex": partial(flex, block_mask=make())}
    return forms | {name: partial(attend, where=where, backend=name) for name in BACKENDS}


def both(call: Callable[..., Tensor], leaves: list[Tensor], grad: Tensor) -> object:
    return torch.autograd.grad(call(*leaves), leaves, grad)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one small problem, forward only")
    options = parser.parse_args(arguments)
    cuda = torch.device(options.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was timed", file=sys.stderr)
        return 2
    dtype = getattr(torch, options.dtype)
    limit = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    print(f"{fingerprint(options.device).sentence}; {options.dtype}, batch 4, 8 heads, d 64")
    print(f"{'problem':30} {'who':6} {'what':17} {'median':>9} {'spread':>9} {'flex / it':>10}")
    wrong = False
    for name, (where, n) in problems(options.quick).items():
        torch.manual_seed(0)
        leaves = [torch.randn(4, 8, n, 64, device=options.device, dtype=dtype) for _ in range(3)]
        grad = torch.randn_like(leaves[0])
        forms = calls(where, n, leaves, compiled=cuda)
        with torch.no_grad():
            truth = forms["flex"](*leaves)
            for form in BACKENDS:
                error = (forms[form](*leaves) - truth).abs().max().item()
                if not error <= limit:
                    print(f"{name:30} {form:6} WRONG, differs from FlexAttention by {error:.1e}; not timed")
                    forms.pop(form)
                    wrong = True
            timed = {"forward": {form: partial(call, *leaves) for form, call in forms.items()}}
            report(name, timed, options)
        if not options.quick:
            leaves = [x.requires_grad_() for x in leaves]
            timed = {
                "forward+backward": {form: partial(both, call, leaves, grad) for form, call in forms.items()}
            }
            report(name, timed, options)
    return int(wrong)


def report(name: str, timed: dict[str, dict[str, Callable]], options: argparse.Namespace) -> None:
    """Time and print one line for each form."""
    for what, group in timed.items():
        rounds = {"min_repeats": options.repeats, "max_repeats": options.repeats}
        found = time_interleaved(group, warmup=3, device=options.device, **rounds)
        for form, timing in found.times.items():
            ratio = (
                found.times["flex"].median_ms / timing.median_ms if "flex" in found.times else float("nan")
            )
            print(
                f"{name:30} {form:6} {what:17} {timing.median_ms:7.2f}ms "
                f"{timing.spread_ms:7.2f}ms {ratio:9.2f}x",
                flush=True,
            )
        for form, error in found.errors.items():
            print(f"{name:30} {form:6} {what:17} failed: {error}")


if __name__ == "__main__":
    sys.exit(main())
