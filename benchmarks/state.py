"""How much must be kept to recall? Accuracy of the `recall` workload against the bytes that decoding keeps.

    python benchmarks/state.py [--steps 300] [--repeats 2] [--threads 2] [--out docs/img/state.svg]

Networks that differ in their mixers only are trained on `recall` with pairs that fill half the sequence, by the
same recipe: linear attention that keeps one D x D matrix per head (lightning_attention, C / D heads: the narrower the
heads, the smaller the state, with as many channels), causal windows that keep the last W keys and values, and full
attention that keeps all. Bytes are float32, of one sample after the whole sequence, all layers together. Every network
is trained until it answers 99.5% or the steps are over, `--repeats` times from different seeds with different data,
`--threads` trainings at a time on one thread each. "half-way" is the accuracy after half the steps: where the last one
is much higher, the network was still learning, and the figure is what it reached in this time, not what its state
could hold.
The run fails, and draws nothing, when full attention has not learned the task, as nothing could be said then.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from foveate.cost.state import decoding_bytes
from foveate.measure.fingerprint import fingerprint
from foveate.mechanisms.baseline.full_attention import FullAttention
from foveate.mechanisms.linear.lightning_attention import LightningAttention
from foveate.mechanisms.local.fused_neighborhood_attention import NeighborhoodAttention
from foveate.models.backbone import Backbone, NetSpec
from foveate.tasks.recall import RecallWorkload
from foveate.tasks.train import Trainer

PICTURE = Path(__file__).parents[1] / "docs" / "img" / "state.svg"
SOLVED = 0.995
LOOKS = 10  # evaluations over a whole training, so that what has learned can stop


@dataclass(frozen=True)
class Rung:
    """One network of the ladder: its family, and the width of a head, of the window, or 0."""

    family: str
    size: int = 0

    @property
    def name(self) -> str:
        return {"linear": f"linear attention, D = {self.size}", "window": f"window of {self.size}"}.get(
            self.family, "full attention"
        )

    def build(self, spec: NetSpec, *, seed: int = 0) -> Backbone:
        layers = count()

        def mixer(*, dim, grid, heads, causal):
            if self.family == "linear":
                return LightningAttention(
                    dim=dim, heads=dim // self.size, layer=next(layers), layers=spec.depth
                )
            if self.family == "window":
                return NeighborhoodAttention(dim=dim, heads=heads, window=(self.size,), causal=causal)
            return FullAttention.for_workload(dim=dim, grid=grid, heads=heads, causal=causal)

        return Backbone(spec, mixer, seed=seed)

    def bytes(self, spec: NetSpec) -> int:
        """Return what decoding keeps of one sample: of a window, the keys and values that are still seen."""
        found = decoding_bytes(self.build(spec))
        if found is None:
            return spec.depth * 2 * min(self.size, spec.grid.numel) * spec.dim * 4
        return found


@dataclass(frozen=True)
class Trained:
    """One training: the steps done, and the accuracy half-way and at the end."""

    steps: int
    half: float
    end: float


def ladder(options) -> list[Rung]:
    return [
        *(Rung("linear", d) for d in options.widths),
        *(Rung("window", w) for w in options.windows),
        Rung("full"),
    ]


def workload(options) -> RecallWorkload:
    return RecallWorkload(
        length=4 * options.pairs,
        pairs=options.pairs,
        keys=options.pairs,
        test_size=options.test,
        dim=options.dim,
    )


def train(rung: Rung, seed: int, options) -> Trained:
    torch.set_num_threads(1)
    trainer = Trainer(workload(options), rung.build, seed=seed)
    half = found = 0.0
    for look in range(1, LOOKS + 1):
        trainer.advance(options.steps * look // LOOKS - trainer.step)
        found = trainer.evaluate().quality
        if 2 * look <= LOOKS:
            half = found
        if found >= SOLVED:
            break
    return Trained(trainer.step, half, found)


def trained(rungs: list[Rung], options) -> dict[Rung, list[Trained]]:
    """Train every network from every seed; the one that ends first comes last, so that no thread waits long."""
    jobs = [(rung, seed) for rung in rungs for seed in range(options.repeats)]
    if options.threads == 1:
        found = [train(rung, seed, options) for rung, seed in jobs]
    else:
        with ProcessPoolExecutor(options.threads, multiprocessing.get_context("spawn")) as pool:
            found = list(pool.map(train, *zip(*jobs, strict=True), [options] * len(jobs)))
    return {
        rung: [one for (other, _), one in zip(jobs, found, strict=True) if other == rung] for rung in rungs
    }


def draw(kept: dict[Rung, int], found: dict[Rung, list[Trained]], floor: tuple[str, float], path: Path):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    looks = {
        "linear": ("linear attention, heads of D channels (lightning_attention)", "C0", "o"),
        "window": ("causal window of W tokens", "C1", "s"),
        "full": ("full attention", "#1b1f23", "*"),
    }
    for family, (label, colour, mark) in looks.items():
        rungs = sorted((r for r in found if r.family == family), key=lambda r: kept[r])
        means = [statistics.mean(t.end for t in found[r]) for r in rungs]
        large = 14 if family == "full" else 7
        ax.plot(
            [kept[r] for r in rungs], means, "-", marker=mark, markersize=large, color=colour, label=label
        )
        for rung, mean in zip(rungs, means, strict=True):
            ends = [t.end for t in found[rung]]
            ax.plot([kept[rung]] * len(ends), ends, "_", color=colour, markersize=9)
            if rung.size:
                name = f"{'D' if family == 'linear' else 'W'} = {rung.size}"
                place = {"xytext": (6, -13), "textcoords": "offset points", "fontsize": 8, "color": colour}
                ax.annotate(name, (kept[rung], mean), **place)
    ax.axhline(floor[1], color="#9aa4ab", linestyle="--", label=f"best trivial answer ({floor[0]})")
    ax.set_xscale("log", base=2)
    ticks = sorted(set(kept.values()))
    ax.set_xticks(ticks, [f"{n / 1024:g}" for n in ticks], fontsize=8, rotation=45)
    ax.minorticks_off()
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("kept for decoding, KiB a sample")
    ax.set_ylabel("questions answered right")
    ax.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "state"}):
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else None)


def command() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="trainings at a time")
    parser.add_argument("--repeats", type=int, default=2, help="seeds")
    parser.add_argument("--steps", type=int, default=300, help="of every training, at most")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--test", type=int, default=128, help="held-out examples")
    parser.add_argument(
        "--widths", type=int, nargs="*", default=[2, 4, 8, 16, 32], help="D of linear attention"
    )
    parser.add_argument("--windows", type=int, nargs="*", default=[24, 48, 72], help="W of the windows")
    parser.add_argument("--out", type=Path, default=PICTURE, help="the picture, .svg or .png")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = command().parse_args(arguments)
    task, rungs = workload(options), ladder(options)
    floor = task.floor()
    print(
        f"{fingerprint().sentence}; float32\nrecall of {task.pairs} pairs in {task.length} tokens, "
        f"{task.spec.depth} layers of {task.spec.dim} channels, batch {task.recipe.batch_size}, "
        f"{options.repeats} seeds; best trivial answer: {floor[0]}, {floor[1]:.3f}"
    )
    started = time.perf_counter()
    kept = {rung: rung.bytes(task.spec) for rung in rungs}
    found = trained(rungs, options)
    print(
        f"{'':24} {'kept, B':>8} {'parameters':>10} {'steps':>7} {'half-way':>8} {'accuracy':>8}  lowest..highest"
    )
    for rung in rungs:
        runs = found[rung]
        ends = [t.end for t in runs]
        steps = "-".join(str(n) for n in sorted({min(t.steps for t in runs), max(t.steps for t in runs)}))
        parameters = rung.build(task.spec).parameter_counts()["total"]
        print(
            f"{rung.name:24} {kept[rung]:8} {parameters:10} {steps:>7} {statistics.mean(t.half for t in runs):8.3f} "
            f"{statistics.mean(ends):8.3f}  {min(ends):.3f}..{max(ends):.3f}"
        )
    seconds = time.perf_counter() - started
    print(f"{seconds:.0f} s for {len(rungs) * options.repeats} trainings, {options.threads} at a time")
    worst = min(t.end for t in found[Rung("full")])
    if worst < 0.9:
        print(f"full attention reached only {worst:.3f}: nothing can be said about states, nothing is drawn")
        return 1
    draw(kept, found, floor, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
