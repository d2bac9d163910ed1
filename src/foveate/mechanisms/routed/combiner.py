"""Combiner: Full Attention Transformer with Sparse Computation Cost. arXiv 2107.05768, 2021.

Attention is a conditional expectation over positions, p(j | i), and it may be factorised: near tokens are attended
to directly, far ones through abstractions of whole regions, p(region | i) p(j | region). A region has a key of its
own, the maximum of its keys, and a value that is attention inside it by the maximum of its queries. All logits share
one softmax, so that every token reaches every other one in a single head, at sub-quadratic cost.

    kbar_r = max_{j in r} k_j,   vbar_r = softmax_{j in r}(max_{j in r} q_j . k_j / sqrt(d)) v_j        (B, H, R, d)
    out_i  = softmax([q_i . k_j, j near i;  q_i . kbar_r, r far from i] / sqrt(d)) [v_j; vbar_r]       no biases

`variant` says what is near and which regions there are:

    sqrt      own segment of s tokens; all earlier segments                                          O(N (s + N/s))
    logn      the token itself; at every power of two the context beside its own                     O(N log N)
    rowmajor  own row of s tokens; the token of the own column in every earlier row, which stands for its row: its
              value is attention over the row, its key a projection of LayerNorm(x + W value)        O(N (s + N/s))
    mixture   own row and own column; in own row, what lies above the other columns; in own column, what lies to
              the left and to the right in the rows above                                            O(N (s + N/s))

A region counts as one key whatever its size. Without causality the same regions lie on both sides: four exclusive
directions for the mixture, as the authors have; for the others this form is inferred (the sibling context at every
level of logn). The authors' number of levels in `logn` is one too small where N - 1 is a power of two:
`official=True`.
"""

import math
from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.banks import Bank, attend_groups
from foveate.mechanisms.inputs import check_tokens
from foveate.mechanisms.projections import QKV, merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.offsets import Offsets, Reach, Spans
from foveate.patterns.pattern import Pattern, check_int
from foveate.routing.blocks import pool_blocks

Variant = Literal["sqrt", "logn", "rowmajor", "mixture"]
Heads = Float[Tensor, "b h n d"]
Groups = list[list[Bank]]
BEFORE: Reach = (None, -1)
AFTER: Reach = (1, None)
SAME: Reach = (0, 0)
ANY: Reach = (None, None)


def spans(q: Heads, k: Heads, v: Heads, size: int, where: Pattern) -> Bank:
    """Return the bank of spans of `size` tokens: pooled keys, and values attended to by pooled queries."""
    summary = attend(pool_blocks(q, size, "max"), k, v, where=Spans(1, size))
    return Bank(pool_blocks(k, size, "max"), summary, where)


def sqrt_banks(q: Heads, k: Heads, v: Heads, *, segment: int, causal: bool) -> Groups:
    """Return the own segment, and all earlier (not causal: all other) segments."""
    near, far = Spans(segment, segment), Spans(segment, 1, *BEFORE)
    near = near & Causal() if causal else near
    far = far if causal else far | Spans(segment, 1, *AFTER)
    return [[Bank(k, v, near), spans(q, k, v, segment, far)]]


def logn_banks(q: Heads, k: Heads, v: Heads, *, levels: int, causal: bool) -> Groups:
    """Return the token with its sibling, and the sibling contexts of 2, 4, 8, ... tokens."""
    pair = Spans(2, 2) if levels else Spans(1, 1)
    banks = [Bank(k, v, pair & Causal() if causal else pair)]
    for size in (2**level for level in range(1, levels)):
        # Two contexts that are halves of one are siblings; the left one is the past of the right one.
        halves, left, right = Spans(2 * size, 2), Spans(size, 1, *BEFORE), Spans(size, 1, *AFTER)
        banks.append(spans(q, k, v, size, halves & left if causal else halves & (left | right)))
    return [banks]


def rowmajor_banks(
    q: Heads, k: Heads, v: Heads, *, row: int, causal: bool, keys_of: Callable[[Heads], Heads]
) -> Groups:
    """Return the own row, and the own column of the other rows, where every token stands for its row.

    Args:
        q, k, v: tokens, rows of `row` one after the other.
        row: tokens of a row.
        causal: earlier tokens and rows alone.
        keys_of: makes the keys of the second bank from its values, attention over the whole row.
    """
    grid = Grid(q.shape[2] // row, row)
    over_row = attend(q, k, v, where=Offsets(grid, (SAME, ANY)))
    near, far = Offsets(grid, (SAME, (None, 0) if causal else ANY)), Offsets(grid, (BEFORE, SAME))
    far = far if causal else far | Offsets(grid, (AFTER, SAME))
    return [[Bank(k, v, near)], [Bank(keys_of(over_row), over_row, far)]]


def mixture_banks(q: Heads, k: Heads, v: Heads, *, row: int, causal: bool) -> Groups:
    """Return own row and column, and running summaries of columns and rows that begin beside them."""
    grid = Grid(q.shape[2] // row, row)
    own_row = Offsets(grid, (SAME, (None, 0) if causal else ANY))
    own_column = Offsets(grid, (BEFORE, SAME)) if causal else _either(grid, (BEFORE, SAME), (AFTER, SAME))
    rows, columns = [Bank(k, v, own_row)], [Bank(k, v, own_column)]
    # A summary that includes its place is read from the place next to it.
    for step in (-1,) if causal else (-1, 1):
        at = (step, step)
        rows.append(_running(q, k, v, grid, 0, step, _either(grid, (at, BEFORE), (at, AFTER))))
    for step in (-1, 1):
        at = (step, step)
        far = Offsets(grid, (BEFORE, at)) if causal else _either(grid, (BEFORE, at), (AFTER, at))
        columns.append(_running(q, k, v, grid, 1, step, far))
    return [rows, columns]


def _either(grid: Grid, first: tuple[Reach, Reach], second: tuple[Reach, Reach]) -> Pattern:
    return Offsets(grid, first) | Offsets(grid, second)


def _running(q: Heads, k: Heads, v: Heads, grid: Grid, axis: int, step: int, where: Pattern) -> Bank:
    """Return the summaries of everything up to (step -1) or from (step 1) each token on along an axis."""

    def top(x: Heads) -> Heads:
        x = x.unflatten(2, grid.sizes)
        x = x.cummax(2 + axis).values if step < 0 else x.flip(2 + axis).cummax(2 + axis).values.flip(2 + axis)
        return x.flatten(2, 3)

    reach: list[Reach] = [SAME, SAME]
    reach[axis] = (None, 0) if step < 0 else (0, None)
    return Bank(top(k), attend(top(q), k, v, where=Offsets(grid, reach)), where)


def near_root(n: int) -> int:
    """Return the divisor of `n` nearest to its square root (the larger of two)."""
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d * d / n)), -d))


@system(
    key="combiner",
    title="Combiner: Full Attention Transformer with Sparse Computation Cost",
    arxiv="2107.05768",
    year=2021,
    family="routed",
    role="pattern",
    cost="O(N sqrt(N) C), logn: O(N log(N) C)",
    fidelity="vectors",
    causal="optional",
    limits="A region counts as one key whatever its size; no attention dropout, and no pooling but the maximum.",
)
class Combiner(nn.Module):
    """Multi-head attention, direct to near tokens and through abstractions of regions to all others.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        variant: "sqrt", "logn", "rowmajor" or "mixture", see above.
        segment: s, tokens of a segment or of a row; None takes about sqrt(N), and the last axis of a grid with
            several. Rows must divide N; segments need not.
        causal: whether tokens see only earlier ones and themselves.
        official: as many levels in `logn` as the authors have.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        variant: Variant = "sqrt",
        segment: int | None = None,
        causal: bool = False,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if variant not in ("sqrt", "logn", "rowmajor", "mixture"):
            raise bad("variant", variant, "'sqrt', 'logn', 'rowmajor' or 'mixture'")
        self.segment = None if segment is None else check_int(segment, "segment", 1)
        self.dim, self.heads, self.variant, self.backend = dim, heads, variant, backend
        self.causal, self.official = causal, official
        self.qkv = QKV(dim, heads, bias=False)
        if variant == "rowmajor":
            self.mix = nn.Linear(dim, dim, bias=False)
            self.norm = nn.LayerNorm(dim, eps=1e-6)
            self.key_row = nn.Linear(dim, dim, bias=False)
        self.proj = nn.Linear(dim, dim, bias=False)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "Combiner":
        """Return segments of about sqrt(N) tokens on sequences, rows and columns on maps."""
        return cls(dim=dim, heads=heads, variant="sqrt" if grid.ndim == 1 else "mixture", causal=causal)

    def size(self, grid: Grid) -> int:
        """Return the tokens of a segment or row on `grid`.

        Raises:
            ArgumentError: naming `segment`, when rows do not divide the tokens.
        """
        n, rows = grid.numel, self.variant in ("rowmajor", "mixture")
        if self.segment is None:
            if grid.ndim > 1:
                return grid[-1]
            return near_root(n) if rows else math.isqrt(n - 1) + 1
        if rows and n % self.segment:
            raise bad("segment", self.segment, f"a divisor of the {n} tokens", f"{near_root(n)} is one.")
        return self.segment

    def banks(self, q: Heads, k: Heads, v: Heads, grid: Grid, x: Tensor | None = None) -> Groups:
        """Return what is attended to, near tokens and abstractions, those seen by rows apart from columns.

        Args:
            q, k, v: per head.
            grid: geometry of the tokens.
            x: the tokens themselves, which "rowmajor" makes keys from.
        """
        if self.variant == "logn":
            n = grid.numel
            levels = (n - 1).bit_length() if not self.official else math.ceil(math.log2(max(n - 1, 1)))
            return logn_banks(q, k, v, levels=levels, causal=self.causal)
        size = self.size(grid)
        if self.variant == "sqrt":
            return sqrt_banks(q, k, v, segment=size, causal=self.causal)
        if self.variant == "mixture":
            return mixture_banks(q, k, v, row=size, causal=self.causal)
        if x is None:
            raise bad("x", x, "the tokens, which variant='rowmajor' makes keys from")

        def keys_of(over_row: Heads) -> Heads:
            return split_heads(self.key_row(self.norm(x + self.mix(merge_heads(over_row)))), self.heads)

        return rowmajor_banks(q, k, v, row=size, causal=self.causal, keys_of=keys_of)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens.

        Raises:
            ArgumentError: naming `x`, `grid`, or `segment` when rows do not divide the tokens.
        """
        check_tokens(x, grid, self.dim)
        q, k, v = self.qkv(x)
        out = attend_groups(q, self.banks(q, k, v, grid, x), backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        segment = "" if self.segment is None else f", segment={self.segment}"
        return f"dim={self.dim}, heads={self.heads}, variant={self.variant!r}{segment}, causal={self.causal}"
