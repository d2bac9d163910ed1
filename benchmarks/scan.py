"""How `scan` stands beside dense causal SDPA, plainly written scans, and itself at other lengths. Ratios of one run.

    python benchmarks/scan.py [--threads 2] [--repeats 5] [--lengths 4096 16384 131072] [--dense-up-to 16384]

For every length: time per token of each kind of decay, forward and forward+backward, and (up to `--dense-up-to`)
how many times faster that is than torch's dense causal attention of the same shape, and than the chunk form made of
torch operators, which runs where the C++ core does not. Then how much
slower three plain forms are, written as one writes them down the first time: the loop over tokens, the table
of all pairs, and chunks with differences of running sums (`--plain-lengths`; the loop and the table only as far
as they end). Then the selective scan beside the plain loop, and the time of one decoding step after short and
after long prefixes. Every figure is a median of interleaved repeats with the distance between the quartiles.
Errors are checked first: nothing is timed when a form is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.scan import crossover_length, scan, scan_step, selective_scan
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
    """Whether a form in chunks errs more than twice as much as the recurrence, all in float32."""
    q, k, v = (torch.randn(1, heads, 700, d) for _ in range(3))
    decay = decay_of(kind, heads, 700, d)
    wide = None if decay is None else decay.double()
    truth = scan(q.double(), k.double(), v.double(), decay=wide, backend="recurrent")
    error = {
        form: (scan(q, k, v, decay=decay, backend=form) - truth).abs().max()
        for form in ("auto", "chunk", "recurrent", "reference")
    }
    return bool(max(error["auto"], error["chunk"]) > 2 * max(error["recurrent"], error["reference"]))


def calls_of(heads: int, n: int, d: int, dense: bool) -> dict[str, Callable[[], object]]:
    """Everything to time at one length: "<decay, decay/chunk or dense> <f or fb>" -> call."""
    leaves = [torch.randn(1, heads, n, d, requires_grad=True) for _ in range(3)]
    tensors = [x.detach() for x in leaves]
    forms = {kind: partial(scan, decay=decay_of(kind, heads, n, d)) for kind in DECAYS}
    if dense:
        forms |= {f"{kind}/chunk": partial(form, backend="chunk") for kind, form in forms.items()}
        forms["dense"] = partial(scaled_dot_product_attention, is_causal=True)

    def both(form):
        torch.autograd.grad(form(*leaves).sum(), leaves)

    calls = {f"{kind} f": partial(form, *tensors) for kind, form in forms.items()}
    return calls | {f"{kind} fb": partial(both, form) for kind, form in forms.items()}


def lengths_table(options) -> None:
    print("x/y: times faster than dense attention / than the chunk form of torch operators")
    print(f"{'N':>7} {'decay':8} {'forward':>36} {'forward+backward':>36}")
    for n in options.lengths:
        calls = calls_of(options.heads, n, options.dim, n <= options.dense_up_to)
        times = time_interleaved(calls, min_repeats=options.repeats, max_repeats=options.repeats).times
        for kind in (*DECAYS, *["dense"] * (n <= options.dense_up_to)):
            cells = []
            for what in ("f", "fb"):
                timing = times[f"{kind} {what}"]
                cell = f"{timing.median_ms * 1e3 / n:7.2f} ±{timing.spread_ms * 1e3 / n:5.2f} us/token"
                if f"{kind}/chunk {what}" in times:
                    dense, chunk = (times[f"{x} {what}"].median_ms for x in ("dense", f"{kind}/chunk"))
                    cell += f" {dense / timing.median_ms:5.1f}x/{chunk / timing.median_ms:4.1f}x"
                cells.append(f"{cell:>36}")
            print(f"{n:7} {kind:8} {' '.join(cells)}", flush=True)


def plain_loop(q, k, v, g):
    """One decay per token (B, H, N): token by token."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    decay, out = g.exp(), torch.empty_like(v)
    for t in range(q.shape[2]):
        state = state * decay[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        out[:, :, t] = (q[:, :, t, :, None] * state).sum(-2)
    return out


def plain_table(q, k, v, g):
    """The weights of all pairs at once."""
    total = g.cumsum(-1)
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    return ((q @ k.mT) * weights) @ v


def plain_chunks(q, k, v, g, size=64):
    """The table inside each chunk, one chunk after the other. Not exact: decays are subtracted, -inf gives NaN."""
    n, d = q.shape[2:]
    short = -n % size
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, short)).unflatten(2, (-1, size)) for x in (q, k, v))
    total = torch.nn.functional.pad(g, (0, short)).unflatten(2, (-1, size)).cumsum(-1)
    weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).tril().exp().tril()
    state, out = q.new_zeros(*q.shape[:2], d, v.shape[-1]), torch.empty_like(v)
    for i in range(q.shape[2]):
        now, last = total[:, :, i, :, None], total[:, :, i, -1:, None]
        inside = ((q[:, :, i] @ k[:, :, i].mT) * weights[:, :, i]) @ v[:, :, i]
        out[:, :, i] = inside + (q[:, :, i] * now.exp()) @ state
        state = state * last.exp() + (k[:, :, i] * (last - now).exp()).mT @ v[:, :, i]
    return out.flatten(2, 3)[:, :, :n]


PLAIN = {"loop": (plain_loop, 2048), "table": (plain_table, 4096), "chunks": (plain_chunks, 1 << 30)}


def plain_calls(heads: int, n: int, d: int) -> dict[str, Callable[[], object]]:
    q, k, v = (torch.randn(1, heads, n, d) for _ in range(3))
    g = decay_of("token", heads, n, d)
    calls = {"scan": partial(scan, q, k, v, decay=g)}
    for name, (form, most) in PLAIN.items():
        if n <= most:
            torch.testing.assert_close(form(q, k, v, g), calls["scan"](), rtol=1e-3, atol=1e-2)
            calls[name] = partial(form, q, k, v, g)
    return calls


def plain_table_of_times(options) -> None:
    print("one decay per token, forward; times slower than scan:")
    with torch.no_grad():
        for n in options.plain_lengths:
            calls = plain_calls(options.heads, n, options.dim)
            repeats = max(options.repeats, 8192 // n)  # short calls scatter more
            times = time_interleaved(calls, min_repeats=repeats, max_repeats=repeats).times
            ours = times.pop("scan").median_ms
            cells = [f"{name} {timing.median_ms / ours:6.2f}x" for name, timing in times.items()]
            print(f"{n:7} {ours * 1e3 / n:7.2f} us/token  {'  '.join(cells)}", flush=True)


def selective(options) -> None:
    """The selective scan of 4 directions, 96 channels, 16 states: time per token, and beside the plain loop."""
    print("selective scan, 4 groups of 96 channels with 16 states:")
    for n in (1024, 4096, 16384):
        sizes = [(1, 4, n, 96), (1, 4, n, 96), (4, 96, 16), (1, 4, n, 16), (1, 4, n, 16)]
        u, dt, a, b, c = (torch.rand(size) for size in sizes)
        leaves = [x.requires_grad_() for x in (u, dt, a.neg(), b, c)]

        def both(backend, leaves=leaves):
            torch.autograd.grad(selective_scan(*leaves, backend=backend).sum(), leaves)

        calls = {"f": partial(selective_scan, *[x.detach() for x in leaves]), "fb": partial(both, "auto")}
        if n <= 1024:
            calls |= {
                "plain f": partial(calls["f"], backend="recurrent"),
                "plain fb": partial(both, "recurrent"),
            }
        times = time_interleaved(calls, min_repeats=3, max_repeats=3).times
        cells = [f"{name} {times[name].median_ms * 1e3 / n:7.2f} us/token" for name in ("f", "fb")]
        if n <= 1024:
            cells += [
                f"plain loop {name} {times[f'plain {name}'].median_ms / times[name].median_ms:5.1f}x"
                for name in ("f", "fb")
            ]
        print(f"{n:7} {'  '.join(cells)}", flush=True)


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
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 131072])
    parser.add_argument("--plain-lengths", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096, 16384])
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
    plain_table_of_times(options)
    selective(options)
    decoding(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
