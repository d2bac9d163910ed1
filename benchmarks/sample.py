"""How `sample` stands beside the same sum written with torch's grid_sample. Ratios of one run.

    python benchmarks/sample.py [--threads 2] [--repeats 7] [--only NAME] [--scale 1.0]

The explicit form calls `grid_sample` level by level, stores the value of every point and adds up; where there
is a depth factor it builds the volume of features times depth first. For every workload: its time over ours,
forward and forward+backward, both medians of interleaved repeats with the distance between the quartiles; then
the most memory alive at once above inputs, forward+backward. Errors are checked first: nothing is timed when
`sample` errs more than twice as much as the explicit form, both against float64.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from foveate.kernels.sample import sample
from foveate.measure.fingerprint import fingerprint
from foveate.measure.memory import peak_bytes
from foveate.measure.timer import time_interleaved


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Shapes of one problem: maps (heads, channels, *size), `points` per query and level, `bins` of depth."""

    what: str
    heads: int
    channels: int
    queries: int
    points: int
    sizes: tuple[tuple[int, ...], ...]
    bins: int = 0
    weighted: bool = True


WORKLOADS = {
    "detr": Workload(
        what="deformable encoder, 4 levels x 4 points",
        heads=8,
        channels=32,
        queries=5440,
        points=4,
        sizes=((64, 64), (32, 32), (16, 16), (8, 8)),
    ),
    "windows": Workload(
        what="keys and values of learned windows, no sum",
        heads=3,
        channels=64,
        queries=3136,
        points=1,
        sizes=((56, 56),),
        weighted=False,
    ),
    "video": Workload(
        what="3-D map, 8 points", heads=4, channels=32, queries=2048, points=8, sizes=((8, 16, 16),)
    ),
    "lifting": Workload(
        what="2-D to 3-D, 4 levels x 8 points, 64 bins of depth",
        heads=8,
        channels=32,
        queries=2500,
        points=8,
        sizes=((28, 50), (14, 25), (7, 13), (4, 7)),
        bins=64,
    ),
}


@dataclass(frozen=True)
class Inputs:
    levels: list[Tensor]
    points: Tensor
    weights: Tensor | None
    factor: list[Tensor] | None

    @property
    def leaves(self) -> list[Tensor]:
        found = [*self.levels, self.points, *(self.factor or [])]
        return found if self.weights is None else [*found, self.weights]

    def double(self) -> Inputs:
        def cast(x):
            return None if x is None else x.detach().double().requires_grad_()

        return Inputs(
            [cast(x) for x in self.levels],
            cast(self.points),
            cast(self.weights),
            None if self.factor is None else [cast(x) for x in self.factor],
        )


def make(workload: Workload, scale: float) -> Inputs:
    """Draw the inputs; `scale` shortens the queries."""
    m, c, p = workload.heads, workload.channels, workload.points
    q, n_levels = max(1, int(workload.queries * scale)), len(workload.sizes)
    axes = len(workload.sizes[0]) + bool(workload.bins)
    points = torch.rand(1, m, q, n_levels, p, axes) * 1.1 - 0.05
    weights = torch.randn(1, m, q, n_levels * p).softmax(-1).unflatten(-1, (n_levels, p))
    factor = [torch.randn(1, workload.bins, *s).softmax(1).requires_grad_() for s in workload.sizes]
    return Inputs(
        [torch.randn(1, m, c, *s, requires_grad=True) for s in workload.sizes],
        points.requires_grad_(),
        weights.requires_grad_() if workload.weighted else None,
        factor if workload.bins else None,
    )


def ours(given: Inputs) -> Tensor:
    return sample(given.levels, given.points, given.weights, factor=given.factor)


def explicit(given: Inputs) -> Tensor:
    """Values of all points by `grid_sample`, then the weighted sum."""
    found = []
    for index, level in enumerate(given.levels):
        if given.factor is not None:
            level = level.unsqueeze(3) * given.factor[index][:, None, None]
        at = (2 * given.points[:, :, :, index] - 1).flatten(0, 1)
        at = at if level.ndim == 5 else at.unsqueeze(1)
        values = grid_sample(level.flatten(0, 1), at, align_corners=False)
        found.append(values.reshape(*level.shape[:3], *given.points.shape[2:5:2]))
    values = torch.stack(found, dim=4)  # (B, M, C, Q, L, P)
    if given.weights is None:
        return values.permute(0, 1, 3, 4, 5, 2)
    return (values * given.weights.unsqueeze(2)).sum((4, 5)).transpose(2, 3)


def both(form, given: Inputs) -> list[Tensor]:
    """Forward and backward."""
    return list(torch.autograd.grad(form(given).sum(), given.leaves))


def wrong(given: Inputs) -> bool:
    """Whether `sample` errs more than twice as much as the explicit form."""
    with torch.no_grad():
        truth = explicit(given.double())
        error, budget = ((form(given) - truth).abs().max() for form in (ours, explicit))
    return bool(error > 2 * budget + 1e-7)


def report(workload: Workload, given: Inputs, repeats: int) -> None:
    """Print times and peak memory of both forms."""

    def forward(form):
        with torch.no_grad():
            form(given)

    calls = {
        f"{name} {what}": (lambda f=form, r=run: r(f))
        for name, form in (("explicit", explicit), ("sample", ours))
        for what, run in (("f", forward), ("fb", lambda f: both(f, given)))
    }
    times = time_interleaved(calls, min_repeats=repeats, max_repeats=repeats).times
    for what, title in (("f", "forward"), ("fb", "forward+backward")):
        a, b = times[f"explicit {what}"], times[f"sample {what}"]
        print(
            f"  {title:17} {a.median_ms / b.median_ms:5.2f}x   explicit {a.median_ms:7.1f} ±{a.spread_ms:5.1f} ms, "
            f"sample {b.median_ms:7.1f} ±{b.spread_ms:5.1f} ms"
        )
    peaks = [peak_bytes(lambda f=form: both(f, given)) or 0 for form in (explicit, ours)]
    print(
        f"  peak memory       {peaks[0] / max(1, peaks[1]):5.2f}x   explicit {peaks[0] / 2**20:7.1f} MiB, "
        f"sample {peaks[1] / 2**20:7.1f} MiB",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", choices=sorted(WORKLOADS))
    parser.add_argument("--scale", type=float, default=1.0, help="shortens the queries of every workload")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{fingerprint().sentence}; float32, batch 1. Times and memory of the explicit form over ours.")
    for name in [options.only] if options.only else WORKLOADS:
        workload = WORKLOADS[name]
        given = make(workload, options.scale)
        sizes = " ".join("x".join(map(str, size)) for size in workload.sizes)
        print(
            f"{name}: {workload.what}; maps {sizes}, {workload.heads} heads of {workload.channels}, "
            f"{given.points.shape[2]} queries"
        )
        if wrong(given):
            print("WRONG: `sample` errs too much; nothing is timed")
            return 1
        report(workload, given, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
