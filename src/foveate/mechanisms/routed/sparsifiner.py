"""Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers.
arXiv 2303.13755, 2023.

A light predictor draws a low-rank picture of the attention matrix; the keys with the largest entries of each
row are the ones its query may see, and ordinary softmax attention runs on them. The class token sees and is
seen by all. Optionally patches that the class token attends to least are pruned for the layers to come.

    A' = softmax(q' (k'^T P) scale) B        (B, H, N', N);  q', k' (.., d/c) narrowed, P and B^T (N, R), R = N/f
    mask = the ceil(keep N) largest entries of a row of A', with few coefficients and |B| above a threshold
    out = softmax(q k^T / sqrt(D) where mask) v

The mask carries no gradient: the predictor learns in a phase of its own, in which attention is dense and A',
with all coefficients and B as it is, is fitted to a teacher's attention T by the sum of (A' - T)^2 over patch
rows (`forward_reconstruct`), which for a low-rank A' takes no N x N matrix (`lowrank_error`).

The authors scale the predictor's products by 1 / sqrt(number of heads) and let the class token count pruned
tokens as zero keys in its softmax: `official=True`. By default the scale is that of the narrowed width, and
pruned tokens do not exist. Their budget after pruning is cut to the first sample's number of patches; here
every sample has the tokens it kept.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.kernels.collect import collect
from foveate.kernels.lowrank import lowrank_error
from foveate.mechanisms.inputs import check_heads, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.cells import cells_of
from foveate.patterns.selection import Selection
from foveate.routing.lowrank import (
    Coefficients,
    FewCoefficients,
    LowRankPredictor,
    Sparsity,
    best_cells,
    mask_above,
)


class Prediction(NamedTuple):
    """What the predictor says about the patches' attention.

    Attributes:
        coefficients: (B, H, P, R), thinned out.
        basis: (R, N), likewise.
        where: the selection of all queries and keys, class token included.
    """

    coefficients: Float[Tensor, "b h p r"]
    basis: Float[Tensor, "r n"]
    where: Selection

    def matrix(self) -> Float[Tensor, "b h p n"]:
        """Return the predicted matrix: for pictures and tests."""
        return self.coefficients @ self.basis


class Pruned(NamedTuple):
    """Output (B, N, C), and the patches (B, P) that the layers to come keep (None while all are kept)."""

    out: Float[Tensor, "b n c"]
    kept: Bool[Tensor, "b p"] | None


@system(
    key="sparsifiner",
    title="Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision Transformers",
    arxiv="2303.13755",
    year=2023,
    family="routed",
    role="router",
    cost="O(N keep N C + N R C + N R N) with a rank R of N / 6; the predicted matrix is scored row by row",
    fidelity="vectors",
    sizes="the grid it was made for",
    limits="All N x N entries are predicted and ranked; the predictor learns only from `forward_reconstruct`.",
    frozen_params=(
        "predictor.proj_c_q.weight",
        "predictor.proj_c_q.bias",
        "predictor.proj_c_k.weight",
        "predictor.proj_c_k.bias",
        "predictor.proj_n",
        "predictor.proj_back_n",
    ),
)
class SparsifinerAttention(nn.Module):
    """Attention to the keys that a low-rank predictor finds worth it.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        grid: the patches it will see.
        class_token: whether one token stands before the patches.
        sparsity: how many keys, coefficients and basis entries are kept (see `Sparsity`).
        reduce_n: tokens per basis row: the rank is N / reduce_n.
        reduce_c: channels of a head per channel of the predictor.
        share_basis: use one matrix for both projections over tokens.
        token_keep: fraction of the patches kept for the layers to come; None prunes none. Needs a class token.
        qkv_bias: whether the q, k, v projections have a bias.
        official: the authors' scale and pruned tokens (see above).
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        grid: Grid,
        class_token: bool = False,
        sparsity: Sparsity | None = None,
        reduce_n: int = 6,
        reduce_c: int = 2,
        share_basis: bool = False,
        token_keep: float | None = None,
        qkv_bias: bool = True,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width, grid = check_heads(dim, heads), Grid.of(grid)
        for name, value in (("reduce_n", reduce_n), ("reduce_c", reduce_c)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        if token_keep is not None and not 0 < token_keep <= 1:
            raise bad("token_keep", token_keep, "a fraction above 0 and at most 1, or None")
        if token_keep is not None and not class_token:
            raise bad("token_keep", token_keep, "None without a class token", "Its attention scores patches.")
        self.dim, self.heads, self.grid, self.backend = dim, heads, grid, backend
        self.class_token, self.token_keep, self.official = class_token, token_keep, official
        self.sparsity = Sparsity() if sparsity is None else sparsity
        self.tokens = grid.numel + class_token
        reduced = max(1, width // reduce_c)
        self.predictor = LowRankPredictor(
            self.tokens,
            width,
            rank=max(1, self.tokens // reduce_n),
            reduced=reduced,
            scale=heads**-0.5 if official else None,
            share=share_basis,
        )
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "SparsifinerAttention":
        """Return the published layer without a class token: a fourth of the keys for each query.

        Raises:
            ArgumentError: naming `causal`.
        """
        refuse_causal(causal, "the keys a query may see are chosen with later tokens in view")
        return cls(dim=dim, heads=heads, grid=grid)

    def _project(self, x: Tensor, grid: Grid, kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(grid, Grid) or grid != self.grid:
            raise bad("grid", grid, f"{self.grid}, for which the bases were made")
        if x.dim() != 3 or x.shape[1:] != (self.tokens, self.dim):
            raise bad("x", tuple(x.shape), f"(batch, {self.tokens} tokens, {self.dim} channels)")
        if not x.is_floating_point():
            raise bad("x", x.dtype, "a floating point tensor")
        q, k, v = self.qkv(x)
        if kept is None:
            return q, k, v
        if kept.shape != (x.shape[0], self.grid.numel) or kept.dtype != torch.bool:
            raise bad("kept", f"{kept.dtype} {tuple(kept.shape)}", "a bool tensor (batch, patches)")
        lost = ~self._with_class(kept)[:, None, :, None]
        return q.masked_fill(lost, 0.0), k.masked_fill(lost, 0.0), v.masked_fill(lost, 0.0)

    def _with_class(self, kept: Bool[Tensor, "b p"]) -> Bool[Tensor, "b n"]:
        """Put the class token, which is always kept, before the patches."""
        return torch.cat([torch.ones_like(kept[:, : int(self.class_token)]), kept], dim=1)

    @torch.no_grad()
    def predict(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, kept: Bool[Tensor, "b p"] | None = None
    ) -> Prediction:
        """Return what the predictor says, and the selection made of it; arguments as `forward_pruned`."""
        q, k, _ = self._project(x, grid, kept)
        coefficients, basis = self._coefficients(q, k, kept)
        where = self._where(coefficients, basis, kept)
        if isinstance(coefficients, FewCoefficients):
            coefficients = coefficients.dense(len(basis))
        return Prediction(coefficients, basis, where)

    @torch.no_grad()
    def _chosen(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Selection:
        return self._where(*self._coefficients(q, k, kept), kept)

    def _coefficients(self, q: Tensor, k: Tensor, kept: Tensor | None) -> tuple[Coefficients, Tensor]:
        """Return the coefficients of the patches' rows and the basis, both thinned out."""
        present = None if kept is None else self._with_class(kept)
        coefficients = self.predictor(q[:, :, int(self.class_token) :], k, q_kept=kept, k_kept=present)
        return self.sparsity.select(coefficients), self.sparsity.thin_basis(self.predictor.basis)

    def _where(self, coefficients: Coefficients, basis: Tensor, kept: Tensor | None) -> Selection:
        n, first = self.tokens, int(self.class_token)
        present = None if kept is None else self._with_class(kept)
        ids = torch.arange(n, device=basis.device)
        every = ids.expand(1, 1, 1, -1)
        rows = ids[first:].view(1, 1, 1, -1)
        if kept is not None and self.sparsity.prune_rows:
            rows = rows.masked_fill(~kept[:, None, None, :], -1)
        budget, threshold = self.sparsity.budget(n), self.sparsity.score_threshold
        if kept is not None and self.official and len(kept):
            budget = min(budget, int(kept[0].sum()))
        if threshold is None:
            cells = [best_cells(rows, coefficients, basis, budget, present)]
        else:
            allowed = mask_above(coefficients, basis, threshold, present)
            cells = [cells_of(rows, every, allowed[:, :, None])]
        if self.class_token:
            if present is not None and not self.official:
                every = every.masked_fill(~present[:, None, None, :], -1)
            cells.append(cells_of(ids[None, None, None, :1], every, None))
        return Selection.of_cells(cells, n, n)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`, class token first where there is one.

        Raises:
            ArgumentError: naming `x`, or `grid` when it is not the one of the constructor.
        """
        return self.forward_pruned(x, grid).out

    def forward_pruned(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, kept: Bool[Tensor, "b p"] | None = None
    ) -> Pruned:
        """Mix the tokens, without the patches pruned before, and prune some more.

        Args:
            x: tokens.
            grid: their geometry.
            kept: False for patches that were pruned; they are neither read nor seen.

        Raises:
            ArgumentError: naming `x`, `grid` or `kept`.
        """
        q, k, v = self._project(x, grid, kept)
        out = attend(q, k, v, where=self._chosen(q, k, kept), backend=self.backend)
        return Pruned(self.proj(merge_heads(out)), self._prune(q, k, kept))

    @torch.no_grad()
    def _prune(self, q: Tensor, k: Tensor, kept: Tensor | None) -> Tensor | None:
        """Return the patches that the class token attends to most, by the mean over heads."""
        if self.token_keep is None:
            return kept
        seen = None if kept is None or self.official else self._with_class(kept)[:, None, None, :]
        one = q[:, :, :1]
        _, lse = attend(one, k, k[..., :1], mask=seen, return_lse=True, backend=self.backend)
        score = collect(one, k, torch.ones_like(one[..., :1]), lse, backend=self.backend)
        score = score[:, :, 1:, 0].mean(1)
        if kept is not None:
            score = score.masked_fill(~kept, float("-inf"))
        top = score.topk(math.ceil(self.token_keep * self.grid.numel), dim=1, sorted=False).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(1, top, True)
        return chosen if kept is None or self.official else chosen & kept

    def forward_reconstruct(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        *,
        teacher: tuple[Float[Tensor, "b h n d"], Float[Tensor, "b h n d"]] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, ""]]:
        """Mix the tokens by dense attention, and return the loss that the predictor learns from.

        Args:
            x: tokens.
            grid: their geometry.
            teacher: queries and keys of the teacher's attention (scaled by D ** -0.5); by default this
                layer's own. No gradient goes to them.

        Returns:
            The output, and the sum of squared differences between predicted and teacher's rows of patches, to
            be averaged over layers (and weighted by 0.01, as published).

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        q, k, v = self._project(x, grid)
        first = int(self.class_token)
        coefficients, basis = self.predictor(q[:, :, first:], k), self.predictor.basis
        t_q, t_k = (q, k) if teacher is None else teacher
        loss = lowrank_error(coefficients, basis, t_q[:, :, first:], t_k, backend=self.backend)
        return self.proj(merge_heads(attend(q, k, v, backend=self.backend))), loss

    def attention_map(
        self, x: Float[Tensor, "b n c"], grid: Grid, *, kept: Bool[Tensor, "b p"] | None = None
    ) -> Float[Tensor, "b h n n"]:
        """Return the sparse weights as a dense map: for pictures and tests."""
        q, k, _ = self._project(x, grid, kept)
        identity = torch.eye(self.tokens, dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
        return attend(q, k, identity, where=self._chosen(q, k, kept), backend=self.backend)

    def extra_repr(self) -> str:
        """Show the options."""
        return f"dim={self.dim}, heads={self.heads}, grid={self.grid}, {self.sparsity}"
