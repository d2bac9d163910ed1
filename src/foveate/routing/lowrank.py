"""Predicting connectivity: a sparse low-rank picture of an attention matrix, and the best keys of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad
from foveate.patterns.cells import Cells, cells_of
from foveate.routing.largest import largest_mask

# Entries of the predicted matrix that stand in memory at a time; fewer where they are read several times.
_CHUNK, _PIECE = 1 << 24, 1 << 21
# Keys are listed, query by query, where there are at least so many times as many.
_LISTED = 16


class FewCoefficients(NamedTuple):
    """The coefficients of each row that are not 0.

    Attributes:
        values: their values.
        index: which basis rows they belong to.
    """

    values: Float[Tensor, "b h q few"]
    index: Int[Tensor, "b h q few"]

    def dense(self, rank: int) -> Float[Tensor, "b h q r"]:
        """Return all `rank` coefficients of each row."""
        empty = self.values.new_zeros(*self.values.shape[:3], rank)
        return empty.scatter(-1, self.index, self.values)


Coefficients = Float[Tensor, "b h q r"] | FewCoefficients


@dataclass(frozen=True)
class Sparsity:
    """How sparse the prediction and the attention are.

    Attributes:
        keep: fraction of the tokens that a query may see as keys; its budget is ceil(keep * N).
        coefficients: coefficients of a row that are kept, the largest ones; None keeps those above
            `coefficient_threshold`. What is kept is not normalised again.
        coefficient_threshold: used where `coefficients` is None; 0 keeps all.
        basis_threshold: entries of the basis up to this size are 0.
        score_threshold: None for the budget; a number lets a query see all keys that score above it.
        prune_rows: whether pruned tokens see nothing (they see their budget otherwise).

    Raises:
        ArgumentError: naming the attribute.
    """

    keep: float = 0.25
    coefficients: int | None = 8
    coefficient_threshold: float = 0.0
    basis_threshold: float = 0.02
    score_threshold: float | None = None
    prune_rows: bool = True

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise bad("keep", self.keep, "a fraction above 0 and at most 1")
        if self.coefficients is not None and self.coefficients < 1:
            raise bad("coefficients", self.coefficients, "a positive integer, or None")
        for name in ("coefficient_threshold", "basis_threshold"):
            if getattr(self, name) < 0:
                raise bad(name, getattr(self, name), "a number >= 0")

    def budget(self, n: int) -> int:
        """Return how many of `n` keys a query sees."""
        return math.ceil(self.keep * n)

    def thin(self, coefficients: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch r"]:
        """Return the coefficients with the small ones set to 0."""
        if self.coefficients is None:
            return functional.threshold(coefficients, self.coefficient_threshold, 0.0)
        top = coefficients.topk(min(self.coefficients, coefficients.shape[-1]), dim=-1, sorted=False)
        return torch.zeros_like(coefficients).scatter(-1, top.indices, top.values)

    def select(self, coefficients: Float[Tensor, "b h q r"]) -> Coefficients:
        """Return `thin(coefficients)`, as a list of what is left where that is short."""
        if self.coefficients is None or 4 * self.coefficients > coefficients.shape[-1]:
            return self.thin(coefficients)
        return FewCoefficients(*coefficients.topk(self.coefficients, dim=-1, sorted=False))

    def thin_basis(self, basis: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
        """Return the sizes of the entries, the small ones set to 0."""
        return functional.threshold(basis.abs(), self.basis_threshold, 0.0)


class LowRankPredictor(nn.Module):
    """An attention matrix as coefficients of its rows times basis rows: softmax(q' (k'^T P) scale) B.

    Queries and keys are narrowed by linear maps that all heads share, keys are summarised over tokens by P
    (N, R), and the R basis rows are B^T (N, R): both belong to the number of tokens.

    Args:
        tokens: number of keys N.
        width: channels of a head.
        rank: R.
        reduced: channels of the narrowed queries and keys.
        scale: factor on their products, `reduced ** -0.5` by default.
        share: use P as B^T.
    """

    def __init__(
        self,
        tokens: int,
        width: int,
        *,
        rank: int,
        reduced: int,
        scale: float | None = None,
        share: bool = False,
    ):
        super().__init__()
        for name, value in (("tokens", tokens), ("width", width), ("rank", rank), ("reduced", reduced)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        self.scale = reduced**-0.5 if scale is None else scale
        self.proj_c_q = nn.Linear(width, reduced)
        self.proj_c_k = nn.Linear(width, reduced)
        self.proj_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_back_n = self.proj_n if share else nn.Parameter(torch.empty(tokens, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both projections over tokens from a truncated normal with standard deviation 0.02."""
        nn.init.trunc_normal_(self.proj_n, std=0.02)
        nn.init.trunc_normal_(self.proj_back_n, std=0.02)

    @property
    def basis(self) -> Float[Tensor, "r n"]:
        """The basis rows, signed."""
        return self.proj_back_n.mT

    def forward(
        self,
        q: Float[Tensor, "b h q d"],
        k: Float[Tensor, "b h n d"],
        *,
        q_kept: Bool[Tensor, "b q"] | None = None,
        k_kept: Bool[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b h q r"]:
        """Return the coefficients of each query; they are positive and sum to 1.

        Args:
            q: queries.
            k: keys.
            q_kept: False for queries whose narrowed vector counts as 0.
            k_kept: the same for keys.
        """
        q, k = self.proj_c_q(q), self.proj_c_k(k)
        if q_kept is not None:
            q = q.masked_fill(~q_kept[:, None, :, None], 0.0)
        if k_kept is not None:
            k = k.masked_fill(~k_kept[:, None, :, None], 0.0)
        return ((q @ (k.mT @ self.proj_n)) * self.scale).softmax(-1)

    def extra_repr(self) -> str:
        """Show the sizes."""
        tokens, rank = self.proj_n.shape
        return f"tokens={tokens}, rank={rank}, scale={self.scale:.3g}"


@torch.no_grad()
def best_keys(
    coefficients: Coefficients,
    basis: Float[Tensor, "r n"],
    budget: int,
    k_kept: Bool[Tensor, "b n"] | None = None,
) -> Int[Tensor, "b h q budget"]:
    """Return, for each row of `coefficients @ basis`, the keys with the largest entries, in no order.

    The matrix is made some rows at a time. No gradient. Rows with fewer keys to take are filled up by -1.

    Args:
        coefficients: of the rows.
        basis: rows of the basis.
        budget: keys of a row.
        k_kept: False for keys that are not to be taken.

    Raises:
        ArgumentError: naming `budget`, unless it is between 1 and the number of keys.
    """
    _check_budget(budget, basis)
    found = []
    for _, scores in _rows_of(coefficients, basis, k_kept, _CHUNK):
        top = scores.topk(budget, dim=-1, sorted=False)
        found.append(top.indices if k_kept is None else top.indices.masked_fill(top.values.isneginf(), -1))
    return torch.cat(found, dim=2)


@torch.no_grad()
def best_mask(
    coefficients: Coefficients,
    basis: Float[Tensor, "r n"],
    budget: int,
    k_kept: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b h q n"]:
    """Return the keys of `best_keys` as a mask: cheaper where they are a large share of all keys."""
    _check_budget(budget, basis)
    mask = _no_mask(coefficients, basis)
    for rows, scores in _rows_of(coefficients, basis, k_kept, _PIECE):
        mask[:, :, rows] = largest_mask(scores.flatten(0, 2), budget).view(scores.shape)
    return mask


def best_cells(
    q_ids: Int[Tensor, "#b 1 1 q"],
    coefficients: Coefficients,
    basis: Float[Tensor, "r n"],
    budget: int,
    k_kept: Bool[Tensor, "b n"] | None = None,
) -> Cells:
    """Return cells in which every query sees its best keys: a cell each, or one of all keys with a mask.

    A cell of one query leaves most of a vector idle, so that a mask takes less time where more than a sixteenth of
    the keys is taken.

    Args:
        q_ids: the queries that the rows belong to, -1 for rows that are left out.
        coefficients, basis, budget, k_kept: as in `best_keys`.
    """
    n = basis.shape[1]
    if _LISTED * budget <= n:
        return cells_of(q_ids.transpose(2, 3), best_keys(coefficients, basis, budget, k_kept), None)
    every = torch.arange(n, device=basis.device).expand(1, 1, 1, n)
    return cells_of(q_ids, every, best_mask(coefficients, basis, budget, k_kept)[:, :, None])


@torch.no_grad()
def mask_above(
    coefficients: Coefficients,
    basis: Float[Tensor, "r n"],
    threshold: float,
    k_kept: Bool[Tensor, "b n"] | None = None,
) -> Bool[Tensor, "b h q n"]:
    """Return which entries of `coefficients @ basis` are above the threshold; arguments as in `best_keys`."""
    mask = _no_mask(coefficients, basis)
    for rows, scores in _rows_of(coefficients, basis, k_kept, _CHUNK):
        torch.gt(scores, threshold, out=mask[:, :, rows])
    return mask


def _check_budget(budget: int, basis: Tensor) -> None:
    if not 1 <= budget <= basis.shape[1]:
        raise bad("budget", budget, f"between 1 and the {basis.shape[1]} keys")


def _no_mask(coefficients: Coefficients, basis: Tensor) -> Tensor:
    shape = (coefficients[0] if isinstance(coefficients, FewCoefficients) else coefficients).shape[:3]
    return torch.zeros(*shape, basis.shape[1], dtype=torch.bool, device=basis.device)


def _rows_of(
    coefficients: Coefficients, basis: Tensor, k_kept: Tensor | None, chunk: int
) -> Iterator[tuple[slice, Float[Tensor, "b h some n"]]]:
    """Yield rows of `coefficients @ basis` with about `chunk` entries in all, -inf where keys are not kept."""
    few = isinstance(coefficients, FewCoefficients)
    basis = basis.contiguous()  # rows are read; that of a predictor is the transpose of a parameter
    b, h, q, _ = (coefficients.values if few else coefficients).shape
    rows = max(1, chunk // max(b * h * basis.shape[1], 1))
    for first in range(0, max(q, 1), rows):
        some = slice(first, first + rows)
        if few:
            # Reads a few rows of the basis per row, where a product reads all.
            values, index = (x[:, :, some] for x in coefficients)
            flat = functional.embedding_bag(
                index.flatten(0, 2), basis, per_sample_weights=values.flatten(0, 2), mode="sum"
            )
            scores = flat.view(*index.shape[:3], basis.shape[1])
        else:
            scores = coefficients[:, :, some] @ basis
        if k_kept is not None:
            scores = scores.masked_fill(~k_kept[:, None, None, :], float("-inf"))
        yield some, scores
