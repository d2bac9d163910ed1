"""Shared by the tests of the core: calls of any kind, the same mathematics plainly, and error budgets."""

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.kernels.problem import Problem
from foveate.kernels.stages import mask_stage, score_stage, weigh_stage
from foveate.patterns.basic import Explicit
from foveate.patterns.selection import Selection
from foveate.patterns.specials import with_specials
from foveate.scores.bias import Bias, Gathered, KeyBias
from foveate.scores.distance import ALiBi, DistanceDecay
from foveate.scores.relative import RelativeTable
from foveate.scores.rules import Sigmoid, Softmax
from foveate.scores.temperature import RowFactor, SoftCap
from tests.patterns.strategies import grid_patterns, halos, patterns

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """One call: tensors in float64 that the dtype can hold, options, and what else has a gradient."""

    tensors: list[torch.Tensor]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    extra: list[torch.Tensor] = field(default_factory=list)
    layout: str = "plain"

    def low(self):
        """Return q, k, v as leaves in the dtype, in the layout."""
        return [laid_out(t.to(self.dtype), self.layout).requires_grad_() for t in self.tensors]

    def exact(self):
        return [t.clone().requires_grad_() for t in self.tensors]


def laid_out(x, layout):
    """Return equal values in another memory layout."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided rows":
        wide = torch.full((*x.shape[:2], 2 * x.shape[2] + 1, x.shape[3] + 5), torch.nan, dtype=x.dtype)
        view = wide[:, :, 1::2, 3:-2]
        view.copy_(x)
        return view.detach()
    if layout == "strided columns":
        wide = torch.full((*x.shape[:3], 2 * x.shape[3]), torch.nan, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2].detach()
    return x.clone()


LAYOUTS = ("plain", "tokens first", "strided rows", "strided columns")


def tensors(n, *, n_k=None, b=2, h=4, hkv=4, d=16, d_v=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (b, h, n, d), (b, hkv, n_k or n, d), (b, hkv, n_k or n, d_v)
    return [torch.randn(s, generator=g).to(dtype).double() for s in shapes]


def outputs(got):
    return list(got) if isinstance(got, tuple) else [got]


def gradients(outs, wanted):
    """Return the gradients of a random function of the outputs."""
    g = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for o in outs:
        weight = torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.dtype).double()
        loss = loss + (o.double().masked_fill(o == -torch.inf, 0.0) * weight).sum()
    return torch.autograd.grad(loss, wanted, allow_unused=True)


class PlainSoftmax(torch.autograd.Function):
    """Softmax attention on given logits whose backward starts from the lse, every step in the dtype of the logits."""

    @staticmethod
    def forward(ctx, logits, v, sink):
        joined = torch.cat([logits, sink], -1)
        lse = joined.logsumexp(-1)
        weights = torch.exp(logits - lse.unsqueeze(-1)).nan_to_num(0.0)
        out = weights @ v
        ctx.save_for_backward(weights, v, sink, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad, grad_lse):
        weights, v, sink, out, lse = ctx.saved_tensors
        delta = (grad * out).sum(-1, keepdim=True) - grad_lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)
        d_logits = weights * (grad @ v.mT - delta)
        d_sink = -torch.exp(sink - lse.unsqueeze(-1)).nan_to_num(0.0) * delta
        return d_logits, weights.mT @ grad, d_sink


def plainly(q, k, v, **options):
    """Write the same mathematics in the dtype of q, step by step."""
    problem = Problem.of(q, k, v, **options)
    share = problem.heads // problem.kv_heads
    k, v = (x.repeat_interleave(share, 1) for x in (problem.k, problem.v))
    at = problem.all_pairs()
    logits = score_stage(problem, problem.q @ k.mT, at)
    if isinstance(problem.weigh, Sigmoid):
        weights, _ = weigh_stage(problem, logits, at, problem.allowed())
        return (weights.to(q.dtype) @ v).to(q.dtype)
    logits, allowed = mask_stage(problem, logits, at, problem.allowed())
    logits = (logits if allowed is None else logits.masked_fill(~allowed, -torch.inf)).to(q.dtype)
    logits = logits.expand(*q.shape[:3], k.shape[2])
    sink = torch.as_tensor(-torch.inf if problem.weigh.sink is None else problem.weigh.sink)
    sink = sink.to(q.dtype).reshape(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    out, lse = PlainSoftmax.apply(logits, v, sink)
    return (out, lse) if problem.return_lse else out


def check(case, backend="cpu"):
    """Compare with the truth in float64 within the error budgets: outputs 2x, gradients 3x the plain error."""
    low, rough_low, exact = case.low(), case.low(), case.exact()
    fast = outputs(attend(*low, backend=backend, **case.options))
    rough = outputs(plainly(*rough_low, **case.options))
    truth = outputs(attend(*exact, backend="reference", **case.options))
    assert fast[0].dtype == case.dtype
    within(fast, rough, truth, 2, case.dtype)
    sides = ((fast, low), (rough, rough_low), (truth, exact))
    got = [gradients(outs, [*held, *case.extra]) for outs, held in sides]
    # The gradient of a slope sums terms as large as the distances it multiplies, those of tables terms of size one.
    far = any(isinstance(part, ALiBi | DistanceDecay) for part in case.options.get("score", ()))
    within(*got, 3, case.dtype, case.tensors[0][..., 0].numel() * (case.tensors[0].shape[2] if far else 1))


def within(fast, rough, truth, factor, dtype, queries=1):
    for index, (a, b, c) in enumerate(zip(fast, rough, truth, strict=True)):
        if c is None or a is None:
            assert all(x is None or not x.any() for x in (a, c)), index
            continue
        assert a.shape == c.shape
        empty = c == -torch.inf
        assert torch.equal(a == -torch.inf, empty), index
        a, b, c = (x.detach().double().masked_fill(empty, 0.0) for x in (a, b, c))
        # A few roundings on top, for where the plain way happens to be exact and for the luck of small samples.
        eps = torch.finfo(dtype).eps * (1 + 16 / max(c.numel(), 1))
        for kind, few in ((root_mean_square, 2), (largest, 8)):
            # Gradients of scores are sums over queries in which terms of size one may cancel to nothing.
            size = max(kind(c), queries**0.5) if index >= 3 else kind(c)
            error, budget = kind(a - c), factor * kind(b - c) + few * eps * size
            assert error <= budget, f"{index}: {kind.__name__} error {error:.2e}, budget {budget:.2e}"


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def root_mean_square(x):
    return x.square().mean().sqrt().item() if x.numel() else 0.0


# ---- strategies ---------------------------------------------------------------------------------------------------


def pick(draw, *values):
    return draw(st.sampled_from(values))


def seeded(draw):
    return torch.Generator().manual_seed(draw(st.integers(0, 1 << 20)))


@st.composite
def selections(draw, b, h, n_q, n_k):
    """Routed cells with absent ids, masks, large cells, and queries in no cell; each query in one cell."""
    g = seeded(draw)
    lead = pick(draw, (1, 1), (b, 1), (1, h), (b, h))
    cells = draw(st.integers(1, 4))
    tq = max(1, min(n_q // cells, pick(draw, 3, 16, 33, 64, 80)))
    tk = draw(st.integers(1, min(n_k, 90)))
    sets = lead[0] * lead[1]
    order = torch.stack([torch.randperm(n_q, generator=g) for _ in range(sets)])
    order = torch.nn.functional.pad(order, (0, cells * tq), value=-1)
    q_ids = order[:, : cells * tq].clone().view(*lead, cells, tq)
    k_ids = torch.stack([torch.randperm(n_k, generator=g)[:tk] for _ in range(sets * cells)])
    k_ids = k_ids.view(*lead, cells, tk).clone()
    if draw(st.booleans()):
        q_ids[torch.rand(q_ids.shape, generator=g) < 0.2] = -1
        k_ids[torch.rand(k_ids.shape, generator=g) < 0.2] = -1
    shape = pick(draw, None, (cells, tq, tk), (1, tq, tk), (1, 1, tk), (cells, tq, 1))
    mask = None if shape is None else torch.rand(shape, generator=g) < 0.7
    if mask is not None and draw(st.booleans()):
        mask = mask | True
    return Selection(q_ids, k_ids, mask, n_q=n_q, n_k=n_k)


@st.composite
def wheres(draw, b, h):
    """Return (where, n_q, n_k, grid or None)."""
    kind = pick(draw, "grid", "grid", "halo", "any", "cross", "routed", "specials")
    sizes = [draw(st.integers(2, 13)) for _ in range(draw(st.integers(1, 3)))]
    while torch.tensor(sizes).prod() > 170:
        sizes[sizes.index(max(sizes))] //= 2
    grid = Grid(*sizes)
    n = grid.numel
    if kind == "grid":
        return draw(grid_patterns(grid)), n, n, grid
    if kind == "halo":
        return draw(halos(grid)), n, n, grid
    if kind == "specials":
        lead = draw(st.integers(1, 3))
        rule = pick(draw, "all", "isolated")
        return with_specials(draw(grid_patterns(grid)), lead, rule=rule), n + lead, n + lead, None
    n_q, n_k = (n, n) if kind == "any" else (n, draw(st.integers(1, 150)))
    if kind == "routed":
        return draw(selections(b, h, n_q, n_k)), n_q, n_k, None
    where = draw(patterns(n_q, n_k))
    return (Explicit(where.dense(n_q, n_k)) if where.has_phantoms else where), n_q, n_k, None


@st.composite
def forms(draw, axes):
    """Return an index function that is a linear form, mostly of an offset along one axis."""
    axis, step, start = draw(st.integers(0, axes - 1)), pick(draw, 1, 1, 2, -1), draw(st.integers(-3, 9))
    slope, other = pick(draw, -step, -step, 0, -3), pick(draw, 0, 0, 1)
    return lambda q, k: step * k[axis] + slope * q[axis] + other * (k[-1] - q[-1]) + start


@st.composite
def scores(draw, b, h, n_q, n_k, grid, g):
    """Return scores the core knows, in its order, and the tensors that have a gradient."""
    found, kinds = [], ["row", "key", "bias", "alibi", "gathered"]
    if grid is not None:
        kinds += ["table", "table", "decay"]

    def made(*shape):
        x = torch.randn(shape, generator=g)
        return x.requires_grad_() if draw(st.booleans()) else x

    for kind in sorted(draw(st.lists(st.sampled_from(kinds), max_size=3, unique=True)), key="row".__ne__):
        if kind == "row":
            found.append(RowFactor(made(*pick(draw, (h, 1), (n_q,), (b, 1, n_q), (b, h, n_q)))))
        elif kind == "key":
            found.append(KeyBias(made(*pick(draw, (n_k,), (b, 1, n_k), (h, 1)))))
        elif kind == "bias":
            found.append(Bias(made(*pick(draw, (n_q, n_k), (h, 1, 1), (b, 1, n_q, 1), (b, h, 1, n_k)))))
        elif kind == "alibi":
            signed, align = draw(st.booleans()), pick(draw, "end", "start")
            if grid is None or grid.ndim == 1:
                found.append(ALiBi(made(h).detach().requires_grad_(), signed=signed, align=align))
        elif kind == "gathered":
            side = pick(draw, "query", "key")
            n = n_q if side == "query" else n_k
            if grid is not None:
                rows = made(pick(draw, 1, b), h, n, draw(st.integers(1, 12)))
                found.append(Gathered(rows, draw(forms(grid.ndim)), side=side, grid=grid, clip=True))
                continue
            rows = made(pick(draw, 1, b), h, n, n_q + n_k)
            found.append(Gathered(rows, lambda q, k: k[0] - q[0] + n_q - 1, side=side))
        elif kind == "decay":
            metric = pick(draw, "manhattan", "euclidean", "chebyshev", "squared")
            found.append(DistanceDecay(made(h), grid, metric))
        else:
            reach = [2 * draw(st.integers(0, min(size, 4))) + 1 for size in grid]
            step = tuple(pick(draw, 1, 1, 2) for _ in grid)
            sign = pick(draw, "key-query", "query-key")
            clip = draw(st.booleans())
            found.append(RelativeTable(made(pick(draw, 1, h), *reach), grid, sign, step, clip))
    if draw(st.booleans()):
        found.append(SoftCap(2.5))
    return found, [t for part in found for t in part.tensors().values() if t.requires_grad]


@st.composite
def cases(draw):
    """Any call the core serves."""
    b, groups, share = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    h = groups * share
    where, n_q, n_k, grid = draw(wheres(b, h))
    g = seeded(draw)
    dtype = pick(draw, *DTYPES)
    sizes = [pick(draw, 1, 8, 9, 16, 24, 32, 40, 64, 72, 100, 128) for _ in range(2)]
    qkv = tensors(
        n_q, n_k=n_k, b=b, h=h, hkv=groups, d=sizes[0], d_v=sizes[1], dtype=dtype, seed=g.initial_seed()
    )
    score, extra = draw(scores(b, h, n_q, n_k, grid, g))
    options = {"where": where, "score": score}
    capped = any(isinstance(part, SoftCap) for part in score)
    if not capped and len(score) < 4 and draw(st.booleans()):
        shape = pick(draw, (b, 1, 1, n_k), (1, 1, n_q, n_k), (b, h, n_q, n_k))
        options["mask"] = torch.rand(shape, generator=g) < 0.7
    rule = pick(draw, "softmax", "softmax", "sink", "learned sink", "sigmoid", "learned sigmoid")
    if rule == "sink":
        options["weigh"] = Softmax(sink=0.5)
    elif rule == "learned sink":
        extra.append(torch.randn(h, generator=g).requires_grad_())
        options["weigh"] = Softmax(sink=extra[-1])
    elif rule == "sigmoid":
        options["weigh"] = Sigmoid(-1.0)
    elif rule == "learned sigmoid" and not capped and len(score) < 3:
        extra.append(torch.randn(h, generator=g).requires_grad_())
        options["weigh"] = Sigmoid(extra[-1])
    options["return_lse"] = "sig" not in rule and draw(st.booleans())
    if options.get("weigh") is not None and isinstance(options["weigh"], Sigmoid):
        options["return_lse"] = False
    return Case(qkv, dtype, options, extra, pick(draw, *LAYOUTS))
