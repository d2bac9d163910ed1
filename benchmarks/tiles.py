"""How many times faster than dense SDPA is backend `tiles`? Ratios of one run, interleaved repeats.

    python benchmarks/tiles.py [--repeats 15] [--threads 2] [--dtype float32] [--only NAME] [--tile 8 8]

Prints for every workload the schedule's bound, the ratio of medians dense / tiles forward and
forward+backward, the spread (10th and 90th percentile of the ratio of neighbouring repeats) and both medians,
dense -> tiles. Errors are checked first: no ratio is printed for a wrong result.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from foveate.core.grid import Grid
from foveate.kernels.problem import Problem
from foveate.kernels.select import plan
from foveate.kernels.tiles import run
from foveate.patterns.basic import SlidingWindow
from foveate.patterns.grids import Neighborhood, Windows
from foveate.patterns.specials import with_specials

WORKLOADS = {
    "2-D 64x64 window 13": (Neighborhood(Grid(64, 64), 13), 8, 64, 4096),
    "2-D 56x56 window 7": (Neighborhood(Grid(56, 56), 7), 4, 32, 3136),
    "2-D 96x96 window 7 dilation 2": (Neighborhood(Grid(96, 96), 7, dilation=2), 2, 64, 9216),
    "3-D 8x32x32 window 3x7x7": (Neighborhood(Grid(8, 32, 32), (3, 7, 7)), 2, 64, 8192),
    "1-D causal 8192 window 256": (SlidingWindow(255), 2, 64, 8192),
    "Swin 56x56 windows 7": (Windows(Grid(56, 56), 7), 4, 32, 3136),
    "64x64 window 13 + 1 class token": (with_specials(Neighborhood(Grid(64, 64), 13), 1), 8, 64, 4097),
}


def timed(fn):
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def interleaved(dense, sparse, repeats):
    """Return (median dense, median sparse, ratios of neighbouring repeats), in seconds."""
    dense(), sparse()
    pairs = [(timed(dense), timed(sparse)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        sorted(a / b for a, b in pairs),
    )


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default="")
    parser.add_argument("--tile", type=int, nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    print(f"{cpu_name()}, {options.threads} threads, {options.dtype}, torch {torch.__version__}, batch 1")
    print(
        f"{'workload':34} {'heads x d':>9} {'tile':>6} {'bound':>6} {'forward':>33} {'forward+backward':>33}"
    )
    wrong = False
    for name, (where, heads, d, n) in WORKLOADS.items():
        if options.only not in name:
            continue
        q, k, v = (torch.randn(1, heads, n, d, dtype=dtype, requires_grad=True) for _ in range(3))
        grad = torch.randn(1, heads, n, d, dtype=dtype)
        tile = tuple(options.tile) if options.tile else None
        problem = Problem.of(q, k, v, where=where)
        chosen = plan(problem, "tiles", tile=tile)

        def sparse(problem=problem, chosen=chosen):
            return run(problem, chosen)[0]

        def dense(q=q, k=k, v=v):
            return F.scaled_dot_product_attention(q, k, v)

        def both(fn, q=q, k=k, v=v, grad=grad):
            return lambda: torch.autograd.grad(fn(), (q, k, v), grad)

        with torch.no_grad():
            truth = F.scaled_dot_product_attention(q, k, v, attn_mask=where.dense(n))
            error = (sparse() - truth).abs().max().item()
            if not error < (1e-5 if dtype == torch.float32 else 2e-2):
                print(f"{name:34} WRONG, error {error:.1e}")
                wrong = True
                continue
            f_dense, f_sparse, f_ratio = interleaved(dense, sparse, options.repeats)
        b_dense, b_sparse, b_ratio = interleaved(both(dense), both(sparse), max(3, options.repeats // 2))

        def cell(a, b, ratios):
            low, high = ratios[len(ratios) // 10], ratios[-1 - len(ratios) // 10]
            return f"{a / b:.1f}x [{low:.1f}..{high:.1f}] {a * 1e3:.0f} -> {b * 1e3:.0f} ms"

        sizes = "x".join(map(str, tile)) if tile else "auto"
        print(
            f"{name:34} {f'{heads} x {d}':>9} {sizes:>6} {chosen.speedup_bound:6.1f} "
            f"{cell(f_dense, f_sparse, f_ratio):>33} {cell(b_dense, b_sparse, b_ratio):>33}",
            flush=True,
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
