"""Random scan problems and an oracle that writes the sum of the contract out, pair by pair."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("none", "number", "head", "token", "channel", "shared")


@dataclass
class Case:
    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor | float | None
    state: Tensor
    chunk: int

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that may carry a gradient."""
        tensors = [self.q, self.k, self.v, self.state]
        return tensors + ([self.decay] if isinstance(self.decay, Tensor) else [])

    def to(self, dtype) -> "Case":
        q, k, v, state = (x.detach().to(dtype) for x in (self.q, self.k, self.v, self.state))
        decay = self.decay.detach().to(dtype) if isinstance(self.decay, Tensor) else self.decay
        return Case(q, k, v, decay, state, self.chunk)


def make(
    seed=0,
    *,
    b=2,
    h=2,
    hkv=None,
    n=10,
    dk=3,
    dv=4,
    kind="token",
    strong=0.0,
    size=0.5,
    chunk=4,
    dtype=torch.float64,
):
    """A case; `strong` is the share of decays that are -1e4 or -inf, `size` the scale of the others."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    shape = {
        "head": (h,),
        "token": (b, h, n),
        "channel": (b, h, n, dk),
        "shared": (1, 1, n, dk),
    }.get(kind)
    decay = None
    if kind == "number":
        decay = -size
    elif shape is not None:
        decay = -torch.rand(shape, generator=draw, dtype=torch.float64) * size
        lot = torch.rand(shape, generator=draw)
        decay = torch.where(lot < strong / 2, -1e4, torch.where(lot < strong, -torch.inf, decay))
    hkv = hkv or h
    case = Case(
        normal(b, h, n, dk), normal(b, hkv, n, dk), normal(b, hkv, n, dv), decay, normal(b, h, dk, dv), chunk
    )
    return case.to(dtype)


@st.composite
def cases(draw, max_n=40):
    """Cases around chunk boundaries, with decays from none to a full reset."""
    chunk = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 64]))
    edge = st.integers(-1, 1).map(lambda d: min(max_n, max(0, chunk * 2 + d)))
    hkv = draw(st.sampled_from([1, 2]))
    return make(
        draw(st.integers(0, 10**6)),
        b=draw(st.integers(1, 2)),
        h=hkv * draw(st.sampled_from([1, 2])),
        hkv=hkv,
        n=draw(st.one_of(st.integers(0, max_n), edge)),
        dk=draw(st.integers(1, 4)),
        dv=draw(st.integers(1, 4)),
        kind=draw(st.sampled_from(KINDS)),
        strong=draw(st.sampled_from([0.0, 0.3, 1.0])),
        size=draw(st.sampled_from([0.0, 1e-8, 1e-6, 0.5, 30.0])),
        chunk=chunk,
    )


def spread(decay, like: Tensor) -> Tensor:
    """The log decay as (B, H, N, D_k), whatever form it was given in."""
    b, h, n, dk = like.shape
    if decay is None:
        decay = 0.0
    if not isinstance(decay, Tensor):
        return torch.full((b, h, n, dk), decay, dtype=like.dtype)
    decay = decay.view(1, h, 1, 1) if decay.ndim == 1 else decay.unsqueeze(-1) if decay.ndim == 3 else decay
    return decay.expand(b, h, n, dk)


def weights(decay, like: Tensor) -> Tensor:
    """exp(g_{j+1} + ... + g_i) for every j <= i, else 0: (B, H, N, N, D_k), one sum at a time."""
    g = spread(decay, like)
    b, h, n, dk = g.shape
    rows = []
    for i in range(n):
        row = [g[:, :, j + 1 : i + 1].sum(2).exp() for j in range(i + 1)]
        rows.append(torch.stack(row + [torch.zeros_like(row[0])] * (n - 1 - i), 2))
    return torch.stack(rows, 2) if rows else g.new_zeros(b, h, 0, 0, dk)


def oracle(case: Case, scale=1.0) -> tuple[Tensor, Tensor]:
    """Outputs and final state, straight from the contract."""
    q, g, n = case.q, spread(case.decay, case.q), case.q.shape[2]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (case.k, case.v))
    table = weights(case.decay, q)
    scores = torch.einsum("bhid,bhijd,bhjd->bhij", q, table, k) * scale
    begin = [g[:, :, : i + 1].sum(2).exp() for i in range(n)]
    out = scores @ v
    state = g.sum(2).exp().unsqueeze(-1) * case.state
    if n:
        out = out + (q * torch.stack(begin, 2)) @ case.state * scale
        state = state + (table[:, :, -1] * k).mT @ v
    return out, state
