"""How `scan` stands beside dense causal SDPA and beside itself at other lengths. Ratios of one run.

    python benchmarks/scan.py [--threads 2] [--repeats 5] [--lengths 4096 16384 65536] [--dense-up-to 16384]

For every length: time per token of each kind of decay, forward and forward+backward, and how many times
faster that is than torch's dense causal attention of the same shape (up to `--dense-up-to`). Then the time
of one decoding step after short and after long prefixes. Every figure is a median of interleaved repeats
with the distance between the quartiles. Errors are checked first: nothing is timed when a form is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.scan import crossover_length, scan, scan_step
from foveate.measure.fingerprint import fingerprint
from foveate.measure.timer import time_interleaved

DECAYS = ("none", "head", "token", "channel")


def decay_of(kind: str, heads: int, n: int, d: int) -> torch.Tensor | None:
    return {
        "none": lambda: None,
        "head": lambda: -torch.linspace(1e-3, 0.5, heads),
        "token": lambda: -torch.rand(1, heads, n) * 0.1,
        "channel": lambda: -torch.rand(1, heads, n, d) * 0.1,
    }[kind]()


def wrong(kind: str, heads: int, d: int) -> bool:
    """Whether the chunk form errs more than twice as much as the recurrence, both in float32."""
    q, k, v = (torch.randn(1, heads, 700, d) for _ in range(3))
    decay = decay_of(kind, heads, 700, d)
    wide = None if decay is None else decay.double()
    truth = scan(q.double(), k.double(), v.double(), decay=wide, backend="recurrent")
    error = {
        form: (scan(q, k, v, decay=decay, backend=form) - truth).abs().max()
        for form in ("chunk", "recurrent", "reference")
    }
    return bool(error["chunk"] > 2 * max(error["recurrent"], error["reference"]))


def calls_of(heads: int, n: int, d: int, dense: bool) -> dict[str, Callable[[], object]]:
    """Everything to time at one length: "<decay or dense> <f or fb>" -> call."""
    leaves = [torch.randn(1, heads, n, d, requires_grad=True) for _ in range(3)]
    tensors = [x.detach() for x in leaves]
    forms = {kind: partial(scan, decay=decay_of(kind, heads, n, d)) for kind in DECAYS}
    if dense:
        forms["dense"] = partial(scaled_dot_product_attention, is_causal=True)

    def both(form):
        torch.autograd.grad(form(*leaves).sum(), leaves)

    calls = {f"{kind} f": partial(form, *tensors) for kind, form in forms.items()}
    return calls | {f"{kind} fb": partial(both, form) for kind, form in forms.items()}


def lengths_table(options) -> None:
    print(f"{'N':>7} {'decay':8} {'forward':>30} {'forward+backward':>30}")
    for n in options.lengths:
        calls = calls_of(options.heads, n, options.dim, n <= options.dense_up_to)
        times = time_interleaved(calls, min_repeats=options.repeats, max_repeats=options.repeats).times
        for kind in dict.fromkeys(name.split()[0] for name in times):
            cells = []
            for what in ("f", "fb"):
                timing = times[f"{kind} {what}"]
                cell = f"{timing.median_ms * 1e3 / n:7.2f} ±{timing.spread_ms * 1e3 / n:5.2f} us/token"
                if f"dense {what}" in times:
                    cell += f" {times[f'dense {what}'].median_ms / timing.median_ms:5.1f}x"
                cells.append(f"{cell:>30}")
            print(f"{n:7} {kind:8} {' '.join(cells)}", flush=True)


def fifty_steps(q, k, v, state, g):
    for _ in range(50):
        scan_step(q, k, v, state, decay=g)


def decoding(options) -> None:
    heads, d = options.heads, options.dim
    g = decay_of("head", heads, 1, d)
    q, k, v = (torch.randn(1, heads, d) for _ in range(3))
    calls = {}
    for n in (64, 16384):
        x = torch.randn(1, heads, n, d)
        _, state = scan(x, x / d, x, decay=g, return_state=True)
        calls[f"after {n} tokens"] = partial(fifty_steps, q, k, v, state, g)
    with torch.no_grad():
        times = time_interleaved(calls, min_repeats=15).times
    for name, timing in times.items():
        print(f"one step {name}: {timing.median_ms * 20:.1f} ±{timing.spread_ms * 20:.1f} us")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536])
    parser.add_argument("--dense-up-to", type=int, default=16384)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{fingerprint().sentence}; float32, batch 1, {options.heads} heads, d {options.dim}")
    bad = [kind for kind in DECAYS if wrong(kind, options.heads, options.dim)]
    if bad:
        print(f"WRONG: {', '.join(bad)}; nothing is timed")
        return 1
    for kind in DECAYS:
        n = crossover_length(dk=options.dim, dv=options.dim, decay=kind)
        print(f"decay {kind}: fewer operations than dense causal attention beyond N = {n}")
    lengths_table(options)
    decoding(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
