"""Do heads that tokens leave out save their time? A layer of mixture of heads beside one with all heads.

    python benchmarks/heads.py [--threads 2] [--repeats 7] [--lengths 512 1024 2048] [--causal]

For every length and share of active heads (a quarter of all heads is shared, the others are drawn at random, a fixed
number per token): time over that of attention with all heads, forward without autograd and forward+backward, medians
of interleaved repeats; in brackets the 10th and 90th percentile of the ratios of neighbouring repeats. `attention` is
`attend_chosen` alone, `layer` the whole module with projections and router, whose baseline is the same module with
all heads active and no router. The row of 100 % says what listing who attends costs, or gains where it is another
backend that runs: time in proportion is a ratio of the share times that of 100 %. Errors are checked first: nothing is
timed when a chosen head differs from dense attention, or another one is not zero.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.measure.fingerprint import fingerprint
from foveate.measure.timer import Timing, time_interleaved
from foveate.mechanisms.baseline.full_attention import FullAttention
from foveate.mechanisms.head_router import attend_chosen
from foveate.mechanisms.scored.mixture_of_heads import MixtureOfHeads
from foveate.patterns.basic import Causal

SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
PASSES = ("f", "fb")


def draw(tokens: int, heads: int, taken: int) -> torch.Tensor:
    """Draw which heads each token takes, (1, N, heads) with `taken` True per token."""
    best = torch.rand(1, tokens, heads).topk(taken, dim=-1).indices
    return torch.zeros(1, tokens, heads, dtype=torch.bool).scatter(-1, best, True)


def check(heads: int, width: int, causal: bool) -> str | None:
    """Say what is wrong at a small size, None if nothing is."""
    q, k, v = (torch.randn(1, heads, 96, width) for _ in range(3))
    chosen = draw(96, heads - heads // 4, heads // 2 - heads // 4)
    where = Causal() if causal else None
    every = torch.cat([torch.ones(1, 96, heads // 4, dtype=torch.bool), chosen], -1).transpose(1, 2)[
        ..., None
    ]
    out = attend_chosen(q, k, v, chosen, where=where)
    error = (out - attend(q, k, v, where=where, backend="reference") * every).abs().max().item()
    if out.masked_select(~every).any():
        return "a head that was not chosen gave something"
    return None if error < 1e-5 else f"chosen heads err by {error:.1e}"


def ratio(one: Timing, base: Timing) -> str:
    """Time over the baseline's, with its spread."""
    each = sorted(a / b for a, b in zip(one.samples_ms, base.samples_ms, strict=False))
    low, high = (each[round(share * (len(each) - 1))] for share in (0.1, 0.9))
    return f"{one.median_ms / base.median_ms:.2f} [{low:.2f}..{high:.2f}]"


def calls_of(n: int, options) -> dict[str, Callable[[], Any]]:
    """Everything that is timed at a length, by name."""
    dim, heads = options.dim, options.heads
    shared, grid = heads // 4, Grid(n)
    q, k, v = (torch.randn(1, heads, n, dim // heads, requires_grad=True) for _ in range(3))
    x = torch.randn(1, n, dim, requires_grad=True)
    where = Causal() if options.causal else None
    made: dict[str, Callable[[], Any]] = {}

    def add(name, run):
        def forward():
            with torch.no_grad():
                run()

        made[f"{name} f"] = forward
        made[f"{name} fb"] = lambda: run().sum().backward()

    add("attention all", lambda: attend(q, k, v, where=where))
    full = FullAttention(dim=dim, heads=heads, causal=options.causal)
    add("layer all", lambda: full(x, grid))
    for share in SHARES:
        routed = max(1, round(share * heads)) - shared
        if routed:
            chosen = draw(n, heads - shared, routed)
            layer = MixtureOfHeads(
                dim=dim, heads=heads, shared=shared, routed=routed, causal=options.causal
            ).eval()
            add(f"layer {share}", lambda layer=layer: layer(x, grid))
        else:
            chosen = torch.zeros(1, n, heads - shared, dtype=torch.bool)
        add(f"attention {share}", lambda chosen=chosen: attend_chosen(q, k, v, chosen, where=where))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds per length")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(fingerprint())
    wrong = check(options.heads, options.dim // options.heads, options.causal)
    if wrong:
        print(f"WRONG, nothing is timed; {wrong}")
        return 1
    kind = "causal" if options.causal else "all pairs"
    print(f"\nfp32, batch 1, dim {options.dim}, {options.heads} heads, {kind}, {options.threads} threads\n")
    print("| N | heads active | attention f | attention fb | layer f | layer fb |\n|---|---|---|---|---|---|")
    for n in options.lengths:
        found = time_interleaved(
            calls_of(n, options), warmup=1, min_repeats=min(2, options.repeats), max_repeats=options.repeats,
            budget_s=options.budget,
        )  # fmt: skip
        if found.errors:
            raise RuntimeError(found.errors)
        for share in SHARES:
            row = []
            for what in ("attention", "layer"):
                for which in PASSES:
                    one = found.times.get(f"{what} {share} {which}")
                    row.append("-" if one is None else ratio(one, found.times[f"{what} all {which}"]))
            print(f"| {n} | {share:.0%} | " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
