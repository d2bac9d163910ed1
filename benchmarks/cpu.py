"""How many times faster than dense SDPA is the C++ core? Ratios of one run, interleaved repeats, a Markdown table.

    python benchmarks/cpu.py [--repeats 9] [--threads 2] [--dtypes float32 bfloat16] [--only NAME]
                             [--tile 4 8] [--no-backward] [--flex] [--markdown FILE]

Dense is `scaled_dot_product_attention` without a mask (causal where the workload is), same dtype and threads.
"Bound" is pairs dense / pairs computed, what `explain` prints. "Of GEMM" is the share of the machine's measured
matrix product rate that the computed pairs reach, in the same dtype. Errors are checked first: no ratio is printed
for a wrong result. `--flex` adds compiled FlexAttention (forward), which compiles for up to half a minute each.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent, isa_levels
from foveate.kernels.cpu.tiling import by_key, flat
from foveate.kernels.problem import Problem
from foveate.kernels.select import Plan, plan
from foveate.measure.fingerprint import fingerprint
from foveate.patterns.basic import BlockList, SlidingWindow
from foveate.patterns.grids import Neighborhood
from foveate.patterns.schedule import Schedule
from foveate.patterns.selection import Selection
from foveate.routing.regions import Regions, select_regions


@dataclass(frozen=True)
class Workload:
    """One row of the table; targets are forward fp32, forward bf16, forward + backward fp32, against FlexAttention."""

    name: str
    where: Callable[[], object]
    n: int
    heads: int
    d: int
    targets: tuple[float, float, float, float | None]
    causal: bool = False


def blocks(n: int, size: int, kept: float) -> BlockList:
    g = torch.Generator().manual_seed(0)
    count = n // size
    mask = torch.zeros(count, count, dtype=torch.bool)
    order = torch.rand(count, count, generator=g).argsort(1)[:, : max(1, round(kept * count))]
    return BlockList(size, mask.scatter(1, order, True))


def routed(grid: Grid, count: int, top: int) -> Selection:
    """`count` x `count` regions, each attending to `top` of them, as a router would choose."""
    g = torch.Generator().manual_seed(0)
    regions = Regions.of_count(grid, count)
    chosen = torch.rand(1, regions.numel, regions.numel, generator=g).argsort(-1)[..., :top]
    return select_regions(regions, chosen)


WORKLOADS = (
    Workload("2-D 64x64, window 13", lambda: Neighborhood(Grid(64, 64), 13), 4096, 8, 64, (10, 8, 7.5, 15)),
    Workload("2-D 56x56, window 7", lambda: Neighborhood(Grid(56, 56), 7), 3136, 4, 32, (17, 13, 12, 15)),
    Workload(
        "2-D 128x128, window 7, dilation 2",
        lambda: Neighborhood(Grid(128, 128), 7, dilation=2),
        16384, 2, 64, (85, 60, 60, 15),
    ),
    Workload(
        "3-D 8x32x32, window 3x7x7",
        lambda: Neighborhood(Grid(8, 32, 32), (3, 7, 7)),
        8192, 2, 64, (19, 14, 14, 15),
    ),
    Workload(
        "1-D causal 16384, window 256", lambda: SlidingWindow(255), 16384, 2, 64, (20, 15, 15, 3), causal=True
    ),
    Workload(
        "routed 56x56, 7x7 regions, top 4", lambda: routed(Grid(56, 56), 7, 4), 3136, 4, 32, (8.5, 7, 6.5, None)
    ),
    Workload(
        "random 64-blocks, 10% kept, 8192", lambda: blocks(8192, 64, 0.1), 8192, 4, 64, (7, 6, 5.5, 2)
    ),
    Workload("dense", lambda: None, 2048, 8, 64, (1, 1, 1, None)),
)  # fmt: skip

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}


def timed(fn: Callable[[], object]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Ratio:
    """Median of a over median of b, and the 10th and 90th percentile of the ratio of neighbours."""

    value: float
    low: float
    high: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.value:.1f}x [{self.low:.1f}..{self.high:.1f}]"


def interleaved(dense: Callable[[], object], sparse: Callable[[], object], repeats: int) -> Ratio:
    dense(), sparse()
    pairs = [(timed(dense), timed(sparse)) for _ in range(repeats)]
    slow, fast = (statistics.median(side) for side in zip(*pairs, strict=True))
    each = sorted(a / b for a, b in pairs)
    return Ratio(slow / fast, each[len(each) // 10], each[-1 - len(each) // 10], fast)


def gemm_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product."""
    x, y = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    x @ y
    return 2 * 2048**3 / statistics.median(timed(lambda: x @ y) for _ in range(7))


def allowed(work: Workload, where: object) -> Tensor | None:
    if where is None:
        return None
    return where.dense() if isinstance(where, Selection) else where.dense(work.n)  # type: ignore[attr-defined]


def wrong(work: Workload, where: object, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> float | None:
    """Return the error where it is too large. One head is compared, in blocks of rows."""
    mask, error = allowed(work, where), 0.0
    for rows in torch.arange(work.n).split(2048):
        part = None if mask is None else mask.reshape(-1, work.n, work.n)[:1, rows]
        truth = F.scaled_dot_product_attention(
            *(x[:, :1].float() for x in (q[:, :, rows], k, v)), attn_mask=part
        )
        error = max(error, (out[:, :1, rows].float() - truth).abs().max().item())
    return None if error < TOLERANCE[q.dtype] else error


def flex(work: Workload, where: object, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return a call of compiled FlexAttention with the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask_mod = getattr(where, "mask_mod", None)
    block = create_block_mask(mask_mod, 1, None, work.n, work.n, device="cpu")
    torch._dynamo.reset()  # else the second shape is compiled as one of any size, which it cannot always do
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v = (x.detach() for x in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=block)


def beside_flex(work: Workload, where: object, q: Tensor, k: Tensor, v: Tensor, sparse, repeats: int) -> str:
    """Return how many times faster the core is than compiled FlexAttention, or that it does not compile."""
    call = flex(work, where, q, k, v)
    try:
        call()
    except Exception as error:
        print(f"{work.name} {q.dtype}: FlexAttention: {type(error).__name__}", file=sys.stderr)
        return "flex does not compile"
    return str(interleaved(call, sparse, repeats))


def row(work: Workload, dtype: torch.dtype, rate: float, options: argparse.Namespace) -> list[str] | None:
    """Measure one workload in one dtype: the cells of its row, None when the result is wrong."""
    where = work.where()
    q, k, v = (torch.randn(1, work.heads, work.n, work.d).to(dtype).requires_grad_() for _ in range(3))
    grad = torch.randn(1, work.heads, work.n, work.d).to(dtype)
    tile = tuple(options.tile) if options.tile else None
    name = "auto" if where is None else "cpu"
    chosen: Plan = plan(Problem.of(q, k, v, where=where), name, tile=tile)

    def sparse() -> Tensor:
        if isinstance(where, Selection):  # a router makes new cells for every call
            fresh = Schedule(where.n_q, where.n_k, where.schedule.groups)
            return attend(q, k, v, where=fresh, backend=name)
        if tile is None:
            return attend(q, k, v, where=where, backend=name)
        from foveate.kernels.cpu.backend import run

        return run(Problem.of(q, k, v, where=where), chosen)[0]

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=work.causal)

    first = 0.0
    with torch.no_grad():
        first = timed(sparse)
        error = wrong(work, where, q, k, v, sparse())
        if error is not None:
            print(f"{work.name} {dtype}: WRONG, error {error:.1e}", file=sys.stderr)
            return None
        forward = interleaved(dense, sparse, options.repeats)
        against = "" if work.targets[3] is None else "not run"
        if options.flex and work.targets[3] is not None and hasattr(where, "mask_mod"):
            against = beside_flex(work, where, q, k, v, sparse, max(3, options.repeats // 3))
    both = None
    if options.backward:
        both = interleaved(
            lambda: torch.autograd.grad(dense(), (q, k, v), grad),
            lambda: torch.autograd.grad(sparse(), (q, k, v), grad),
            max(3, options.repeats // 2),
        )
    target = work.targets[1 if dtype != torch.float32 else 0]
    dense_pairs = work.heads * work.n * (work.n + 1) // 2 if work.causal else chosen.pairs_dense
    bound = dense_pairs / chosen.pairs_computed
    useful = 4 * work.d * chosen.pairs_needed / forward.seconds
    tile_text = "x".join(map(str, chosen.cell_tile or ())) or "given"
    return [
        work.name, str(dtype).removeprefix("torch."), tile_text, f"{bound:.1f}", str(forward), f"{target:g}",
        f"{bound * 7 / 9:.1f}" if where is not None else "1.0", "" if both is None else str(both),
        f"{work.targets[2]:g}" if dtype == torch.float32 else "", against,
        "" if work.targets[3] is None else f"{work.targets[3]:g}", f"{useful / 1e9:.0f}",
        f"{chosen.flops / forward.seconds / rate:.0%}", f"{first * 1e3:.0f}",
    ]  # fmt: skip


HEADER = [
    "workload", "dtype", "tile", "bound", "forward / dense", "target", "bound f+b", "forward+backward / dense",
    "target", "forward / flex", "target", "useful GFLOP/s", "of GEMM", "first call ms",
]  # fmt: skip


def beside(threads: int) -> str:
    """What a routed call pays besides the core, since its cells are new every time."""
    selection = routed(Grid(56, 56), 7, 4)
    groups = selection.schedule.groups

    def made(fn: Callable[[Schedule], object]) -> float:
        fresh = [Schedule(3136, 3136, groups) for _ in range(9)]
        return statistics.median(timed(lambda s=s: fn(s)) for s in fresh) * 1e3

    return (
        f"Routed cells are made anew for every call above; flattening them takes {made(flat):.2f} ms, "
        f"their transpose for the backward {made(by_key):.2f} ms ({threads} threads)."
    )


def scaling(repeats: int) -> str:
    """Nanoseconds per pair computed, forward and forward + backward, as the grid grows: they should not."""
    found = []
    for side in (64, 128, 256):
        where = Neighborhood(Grid(side, side), 13)
        q, k, v = (torch.randn(1, 2, side * side, 64, requires_grad=True) for _ in range(3))
        grad = torch.randn(1, 2, side * side, 64)
        pairs = plan(Problem.of(q, k, v, where=where), "cpu").pairs_computed

        def forward(q=q, k=k, v=v, where=where) -> Tensor:
            return attend(q, k, v, where=where, backend="cpu")

        def both(forward=forward, inputs=(q, k, v), grad=grad) -> object:
            return torch.autograd.grad(forward(), inputs, grad)

        times = [min(timed(fn) for _ in range(repeats)) / pairs * 1e9 for fn in (forward, both)]
        found.append(f"{side}x{side} {times[0]:.2f} and {times[1]:.2f}")
    return f"Nanoseconds per pair computed, forward and forward+backward, window 13: {'; '.join(found)}."


def memory(side: int) -> str:
    """Peak memory of a forward and backward, over the bytes of inputs, output and gradients, in a new process."""
    code = f"""
import torch
from foveate import Neighborhood, attend
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
def run(side, heads):
    q, k, v = (torch.randn(1, heads, side * side, 64, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, where=Neighborhood((side, side), 13), backend="cpu")
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    return 8 * q.numel() * 4
run(16, 1)
before = peak()
must = run({side}, 8)
print((peak() - before) / must)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    shown = (
        f"{float(done.stdout):.2f}x"
        if done.returncode == 0
        else f"not measured ({done.stderr.strip()[-80:]})"
    )
    return (
        f"Peak memory of forward and backward on a {side}x{side} grid, 8 heads, d 64, float32: {shown} the bytes of "
        "inputs, output and gradients."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--only", default="")
    parser.add_argument("--tile", type=int, nargs="*")
    parser.add_argument("--backward", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--flex", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--side", type=int, default=512, help="of the grid whose peak memory is measured")
    parser.add_argument("--markdown", type=Path)
    options = parser.parse_args()
    if absent() is not None:
        print(f"{absent()}: nothing to measure", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rates = {name: gemm_rate(getattr(torch, name)) for name in options.dtypes}
    shown = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())
    lines = [
        f"{fingerprint().sentence}, core: {isa_levels()[-1]}. Measured matrix products: {shown}.",
        "Ratios of medians, [10th..90th percentile] of neighbouring repeats; batch 1.",
        "", f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    failed = False
    for work in WORKLOADS:
        if options.only not in work.name:
            continue
        for name in options.dtypes:
            cells = row(work, getattr(torch, name), rates[name], options)
            failed |= cells is None
            if cells is not None:
                lines.append(f"| {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    print("", flush=True)
    for extra in () if options.only else (
        lambda: beside(options.threads), lambda: scaling(options.repeats), lambda: memory(options.side)
    ):  # fmt: skip
        lines += ["", extra()]
        print(lines[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
