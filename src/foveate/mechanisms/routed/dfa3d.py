"""DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting. arXiv 2307.12972, 2023.

Queries in space (cells of a bird's-eye view, say) gather features from camera images. Each query is projected
into a view to a few reference points (x, y, depth), moves away from them by learned offsets, and adds up what it
finds there with weights that come from the query alone. A pixel shows at an unknown depth, so every pixel carries
a distribution over D bins of depth, and a feature counts as far as its pixel is believed to lie at the depth
asked for. That is deformable attention in the volume feature x distribution, which is never built: with v_l the
projected maps, F_l the distributions, n the 4 pixels around (x, y) and w_n their bilinear weights,

    p = reference + (W_xy z, W_d z) / (width_l, height_l, D);   a = softmax_{l, p}(W_a z)       z (B, Q, C)
    s_n = (1 - f) F_l[n, b] + f F_l[n, b + 1],  b + f = depth of p in bins                      4 a point
    out = sum_{l, p} a_lp sum_n w_n s_n v_l[n]                                                   (B, Q, C)
    confidence = sum_{l, p} a_lp mean_n s_n                                                      (B, Q, heads)

Point p of a level starts from anchor p mod Z of the Z reference points. As published there is no projection of
the output: what surrounds this layer averages views first and then projects. The operator is proven against
the authors' kernels; the layer follows their code. One path of theirs loses the gradient of x and y (its
backward writes into a copy); here it is the gradient of the formula.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import bad
from foveate.core.registry import system
from foveate.kernels.sample import sample
from foveate.mechanisms.inputs import check_heads
from foveate.mechanisms.projections import merge_heads, split_heads


@system(
    key="dfa3d",
    title="DFA3D: 3D Deformable Attention For 2D-to-3D Feature Lifting",
    arxiv="2307.12972",
    year=2023,
    family="routed",
    role="module",
    cost="O((Q + S) C^2 + Q L P C + S D), S pixels, L levels of P points",
    layout="cross",
    fidelity="vectors",
    primitive="sample",
    limits="Lifts camera views: it needs maps, a depth distribution per pixel and reference points for its queries.",
    dims=(2,),
)
class DepthDeformableAttention(nn.Module):
    """Queries gather features of images at (x, y, depth), where a pixel counts by its depth distribution.

    Args:
        dim: channels C of queries and maps.
        heads: number of heads M; must divide `dim`.
        levels: number of maps L (resolutions of one view).
        points: points P per head and level, over all anchors.
        anchors: reference points Z per query; must divide `points`.
        backend: of `sample`.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int = 8,
        levels: int = 4,
        points: int = 8,
        anchors: int = 4,
        backend: str = "auto",
    ):
        super().__init__()
        check_heads(dim, heads)
        for name, value in (("levels", levels), ("points", points), ("anchors", anchors)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        if points % anchors:
            raise bad("points", points, f"a multiple of anchors={anchors}")
        self.dim, self.heads, self.levels = dim, heads, levels
        self.points, self.anchors, self.backend = points, anchors, backend
        self.value = nn.Linear(dim, dim)
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.depth_offsets = nn.Linear(dim, heads * levels * points)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with points that leave the reference in one direction per head, farther point by point."""
        for layer in (self.offsets, self.depth_offsets, self.weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.zeros_(self.value.bias)
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        far = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        with torch.no_grad():
            square = direction / direction.abs().amax(-1, keepdim=True)
            shape = (self.heads, self.levels, self.points)
            self.offsets.bias.view(*shape, 2).copy_(square[:, None, None] * far)
            self.depth_offsets.bias.view(*shape).copy_(direction.mean(-1)[:, None, None] * far[..., 0])

    def example(self, x: Float[Tensor, "b q c"]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return reference points, maps and depth distributions for queries `x`, drawn from a fixed seed."""
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.rand((1, *shape), generator=g)

        def given(y: Tensor) -> Tensor:
            return y.to(x).expand(x.shape[0], *y.shape[1:])

        sizes = [(max(1, 9 >> i), max(1, 12 >> i)) for i in range(self.levels)]
        maps = [given(draw(self.dim, *size) - 0.5) for size in sizes]
        depth = [given((2 * draw(6, *size)).softmax(1)) for size in sizes]
        return given(draw(x.shape[1], self.anchors, 3)), maps, depth

    def positions(
        self, x: Float[Tensor, "b q c"], reference: Float[Tensor, "b q z 3"], sizes: Sequence[Sequence[int]]
    ) -> Float[Tensor, "b m q l p 3"]:
        """Return where each head looks, (x, y, depth) in [0, 1]; offsets count pixels and bins of a level.

        Args:
            x: queries.
            reference: where they start from.
            sizes: (D, height, width) of every level.
        """
        wide = accumulation_dtype(x.dtype)
        inner = (self.heads, self.levels, self.points)
        parts = [self.offsets(x).unflatten(-1, (*inner, 2)), self.depth_offsets(x).unflatten(-1, (*inner, 1))]
        offsets = torch.cat(parts, dim=-1).to(wide)
        unit = torch.tensor([tuple(reversed(size)) for size in sizes], dtype=wide, device=x.device)
        offsets = (offsets / unit[:, None]).unflatten(-2, (-1, self.anchors))
        points = reference.to(wide)[:, :, None, None, None] + offsets
        return points.flatten(-3, -2).transpose(1, 2)

    def forward(
        self,
        x: Float[Tensor, "b q c"],
        reference: Float[Tensor, "b q z 3"],
        maps: Sequence[Float[Tensor, "b c _ _"]],
        depth: Sequence[Float[Tensor, "b d _ _"]],
        *,
        return_confidence: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Gather features for every query.

        Args:
            x: queries, with whatever positions they need already added.
            reference: their projections into the view, Z each: (x, y, depth) in [0, 1] over the image and the
                range of depth. Points outside find nothing.
            maps: L feature maps of the view, (B, C, H_l, W_l).
            depth: the distribution over bins of depth at every pixel of every level, (B, D, H_l, W_l), all heads
                alike.
            return_confidence: also return how much of each head's weight fell on pixels believed to lie at the
                depth asked for, (B, Q, heads). The authors fill up with a learned embedding times one minus it.

        Returns:
            (B, Q, C), heads side by side, or that and the confidence.

        Raises:
            ArgumentError: naming the argument that does not fit.
        """
        self._check(x, reference, maps, depth)
        values = []
        for level in maps:
            heads = split_heads(self.value(level.flatten(2).transpose(1, 2)), self.heads)
            values.append(heads.transpose(2, 3).unflatten(3, level.shape[2:]))
        points = self.positions(x, reference, [d.shape[1:] for d in depth])
        inner = (self.levels, self.points)
        weights = split_heads(self.weights(x), self.heads).softmax(-1).unflatten(-1, inner)
        out = merge_heads(sample(values, points, weights, factor=depth, backend=self.backend))
        if not return_confidence:
            return out
        trust = (corner_depths(depth, points).mean(-1) * weights).sum((3, 4))
        return out, trust.transpose(1, 2).to(out.dtype)

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, levels={self.levels}, points={self.points}, "
            f"anchors={self.anchors}"
        )

    def _check(self, x: Tensor, reference: Tensor, maps: Sequence[Tensor], depth: Sequence[Tensor]) -> None:
        if x.dim() != 3 or x.shape[2] != self.dim:
            raise bad("x", tuple(x.shape), f"(batch, queries, {self.dim})")
        accumulation_dtype(x.dtype)
        wanted = (*x.shape[:2], self.anchors, 3)
        if tuple(reference.shape) != wanted:
            raise bad(
                "reference", tuple(reference.shape), f"{wanted}: (batch, queries, anchors, (x, y, depth))"
            )
        for name, given, channels in (("maps", maps, self.dim), ("depth", depth, "D")):
            if isinstance(given, Tensor) or len(given) != self.levels:
                raise bad(
                    name, f"{len(given)} of type {type(given).__name__}", f"a list of {self.levels} maps"
                )
            for index, level in enumerate(given):
                if level.dim() != 4 or level.shape[0] != x.shape[0] or channels not in ("D", level.shape[1]):
                    expected = f"({x.shape[0]}, {channels}, height, width)"
                    raise bad(f"{name}[{index}]", tuple(level.shape), expected)


def corner_depths(
    depth: Sequence[Float[Tensor, "b ..."]], points: Float[Tensor, "b m q l p 3"]
) -> Float[Tensor, "b m q l p 4"]:
    """Return the factor at the four pixels around each point, linear between bins, 0 outside the volume.

    Args:
        depth: per level (B, D, H, W), or (B, M, D, H, W) for one per head.
        points: (x, y, depth) in [0, 1].

    Returns:
        In the order (y, x), (y, x+1), (y+1, x), (y+1, x+1).
    """
    found = []
    for index, level in enumerate(depth):
        size = torch.tensor(tuple(reversed(level.shape[-3:])), device=points.device)
        at = (points[:, :, :, index] * size - 0.5).unsqueeze(-2)
        step = torch.tensor([(0, 0), (1, 0), (0, 1), (1, 1)], dtype=at.dtype, device=at.device)
        pixels = at[..., :2].floor() + step
        corners = torch.cat([pixels, at[..., 2:].expand(*pixels.shape[:-1], 1)], dim=-1)
        volume = level if level.dim() == 5 else level.unsqueeze(1)
        # Heads that share a distribution are more queries of one head.
        places = (
            corners.flatten(3, 4) if volume.shape[1] > 1 else corners.flatten(1, 2).flatten(2, 3).unsqueeze(1)
        )
        read = sample([volume.unsqueeze(2)], places.unsqueeze(3), coords="pixels")
        found.append(read.reshape(corners.shape[:-1]))
    return torch.stack(found, dim=3)
