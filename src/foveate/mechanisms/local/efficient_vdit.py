"""Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile. arXiv 2502.06155, 2025.

The attention map of a video transformer looks like tiles, frames by frames of them, that resemble one another,
with a stronger diagonal. So each token looks at its own frame and at a few reference frames of the whole video,
and the cost grows in proportion to the number of frames. An offline search gives every layer the sparsest of
these masks that changes the layer's output by less than a threshold; the model is then distilled with them.

    tokens i on a grid (frames F, space S), f(i) = i // S;  q, k, v, out (B, H, F S, D)
    A(i) = { j : f(j) = f(i) or f(j) in G },  |G| = k reference frames
    out_i = sum_{j in A(i)} softmax_j(q_i . k_j / sqrt(D)) v_j;  density ((k + 1) - k / F) / F
    search, per layer: the sparsest A with mean |out_full - out_A|^2 <= r, else full attention

Text and memory of the paper, no code: that a mask keeps own frame and k reference frames and how the search
goes is the paper's; which frames G are (the middles of k equal parts) is ours, and whether reference frames look
at everything in return is not certain: off by default, `bidirectional=True` otherwise.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_tokens, refuse_causal
from foveate.mechanisms.projections import QKV, merge_heads
from foveate.patterns.basic import BlockList

Sample = tuple[Tensor, Tensor, Tensor]


def reference_frames(frames: int, references: int) -> tuple[int, ...]:
    """Return `references` of `frames` frames, spread evenly: the middles of equal parts.

    Raises:
        ArgumentError: naming `references`, unless 0 <= references <= frames.
    """
    if isinstance(references, bool) or not isinstance(references, int) or not 0 <= references <= frames:
        raise bad("references", references, f"an integer from 0 to the {frames} frames")
    return tuple((2 * i + 1) * frames // (2 * references) for i in range(references))


def attention_tile(grid: Grid, references: int, *, bidirectional: bool = False) -> BlockList:
    """Return the mask in which frames see themselves and the reference frames.

    Args:
        grid: the first axis counts frames, the others are a frame's space.
        references: k, reference frames; 0 is attention inside frames, as many as there are frames is full.
        bidirectional: whether reference frames see all frames in return.

    Raises:
        ArgumentError: naming `references`.
    """
    frames = grid[0]
    seen = reference_frames(frames, references)
    pairs = {(f, f) for f in range(frames)} | {(f, g) for f in range(frames) for g in seen}
    if bidirectional:
        pairs |= {(g, f) for g in seen for f in range(frames)}
    return BlockList(grid.numel // frames, pairs)


@dataclass(frozen=True)
class Choice:
    """What the search gives a layer.

    Attributes:
        references: k of the mask; as many as there are frames means full attention.
        where: the mask.
        error: mean squared difference of the layer's output, over all samples.
        errors: (references, error) of every mask that was tried, sparsest first.
    """

    references: int
    where: BlockList
    error: float
    errors: tuple[tuple[int, float], ...]


@torch.no_grad()
def search_mask(
    samples: Iterable[Sample],
    grid: Grid,
    threshold: float,
    *,
    candidates: Sequence[int] | None = None,
    bidirectional: bool = False,
    project: Callable[[Float[Tensor, "b h n d"]], Tensor] | None = None,
    backend: str = "auto",
) -> Choice:
    """Find the sparsest mask of one layer that changes its output by no more than `threshold`.

    Args:
        samples: (q, k, v) of the layer, each (B, H, N, D), from calibration prompts and timesteps.
        grid: frames and space.
        threshold: r, on the mean squared error. A larger one never gives a denser mask.
        candidates: numbers of reference frames to try, 0 to F - 1 when None; full attention always is one.
        bidirectional: as in `attention_tile`.
        project: what makes the layer's output of the heads' outputs; nothing when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `samples`, `threshold` or `references`.
    """
    samples, frames = list(samples), grid[0]
    if not samples:
        raise bad("samples", samples, "one (q, k, v) or more")
    if not threshold >= 0:
        raise bad("threshold", threshold, "a number >= 0")
    tried = sorted({*(range(frames) if candidates is None else candidates), frames})
    masks = {k: attention_tile(grid, k, bidirectional=bidirectional) for k in tried}
    finish = (lambda out: out) if project is None else project
    total = dict.fromkeys(tried, 0.0)
    count = 0
    for q, k, v in samples:
        full = finish(attend(q, k, v, backend=backend))
        count += full.numel()
        for number in tried[:-1]:
            out = finish(attend(q, k, v, where=masks[number], backend=backend))
            total[number] += float((out - full).double().square().sum())
    errors = tuple((number, total[number] / count) for number in tried)
    best, error = next((n, e) for n, e in errors if e <= threshold)
    return Choice(best, masks[best], error, errors)


@system(
    key="efficient_vdit",
    title="Efficient-vDiT: Efficient Video Diffusion Transformers with Attention Tile",
    arxiv="2502.06155",
    year=2025,
    family="local",
    role="pattern",
    cost="O(F S^2 (k + 1) C), F frames of S tokens",
    fidelity="reconstruction",
    dims=(2, 3),
    limits="Made for video whose frames resemble one another; the choice of reference frames is ours. The "
    "distillation that follows the search, and the one over time steps, are not part of this.",
)
class TileAttention(nn.Module):
    """Multi-head attention to a token's own frame and to reference frames.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        references: k, reference frames; on shorter videos all frames are.
        bidirectional: whether reference frames see all frames in return.
        qkv_bias: whether the q, k, v projections have a bias.
        scale: of the logits; 1 / sqrt(head width) when None.
        backend: of `attend`.

    Raises:
        ArgumentError: naming `references`.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        references: int = 2,
        bidirectional: bool = False,
        qkv_bias: bool = True,
        scale: float | None = None,
        backend: str = "auto",
    ):
        super().__init__()
        if isinstance(references, bool) or not isinstance(references, int) or references < 0:
            raise bad("references", references, "an integer >= 0")
        self.dim, self.heads, self.scale, self.backend = dim, heads, scale, backend
        self.references, self.bidirectional = references, bidirectional
        self.qkv = QKV(dim, heads, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @classmethod
    def for_workload(cls, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> "TileAttention":
        """Return one reference frame for every 8, at least 2; the first axis of `grid` counts as frames.

        Raises:
            ArgumentError: naming `grid` or `causal`.
        """
        refuse_causal(causal, "frames look at reference frames behind and ahead")
        if grid.ndim < 2:
            raise bad("grid", grid, "a grid with 2 or 3 axes", "The first one counts frames.")
        return cls(dim=dim, heads=heads, references=max(2, grid[0] // 8))

    def where(self, grid: Grid) -> BlockList:
        """Return the mask on `grid`."""
        return attention_tile(grid, min(self.references, grid[0]), bidirectional=self.bidirectional)

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Mix the tokens of `grid`, frame after frame.

        Raises:
            ArgumentError: naming `x` or `grid`.
        """
        check_tokens(x, grid, self.dim, (2, 3))
        q, k, v = self.qkv(x)
        out = attend(q, k, v, where=self.where(grid), scale=self.scale, backend=self.backend)
        return self.proj(merge_heads(out))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, references={self.references}, "
            f"bidirectional={self.bidirectional}"
        )
