"""RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling. arXiv 2308.03429, 2023.

Transformer-XL's relative attention whose queries, keys and values each pass a short causal depthwise convolution after
their projection, one set of kernels shared by all heads. A learned vector and a number per head and offset, and a
learned query that asks for keys whatever the token, make up the position term. A memory of earlier inputs stands
before the tokens, as in Transformer-XL.

    q, k, v = conv(x W_q), conv([m; x] W_k), conv([m; x] W_v + b)     conv over 3 tokens, per channel, + bias
    L[i, j] = ((q_i + u) . k_j + q_i . E_(j-i) + S_(j-i)) / sqrt(D)   (B, H, N, M + N), j - i between positions
    out = softmax(L) v W_o + b                                        E (2P, H, D), S (2P, H), u (H, D)

E, S and u start at zero, that is, as attention without positions. In the authors' code the convolution of the queries
does not see the memory, so that results change a little with where a text is cut; here it does, and decoding token by
token equals the forward pass. `official=True` restarts it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.core.registry import system
from foveate.kernels.attend import attend
from foveate.mechanisms.inputs import check_heads, check_tokens
from foveate.mechanisms.past import length
from foveate.mechanisms.projections import merge_heads, split_heads
from foveate.patterns.basic import Causal
from foveate.patterns.pattern import check_int
from foveate.scores.skew import RelativeLogits


class ConvolvedPast(NamedTuple):
    """Keys and values of all tokens so far, and the last projections that the convolutions still need."""

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n d"]
    tail: Float[Tensor, "b h t d3"]


class HeadConvolution(nn.Conv1d):
    """A causal depthwise convolution over tokens with one kernel per channel of a head, shared by all heads."""

    def __init__(self, width: int, kernel: int):
        super().__init__(width, width, kernel, groups=width)

    def forward(self, x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b h m d"]:
        """Convolve rows that start with the `kernel - 1` ones before the first wanted."""
        y = super().forward(x.flatten(0, 1).transpose(1, 2))
        return y.transpose(1, 2).unflatten(0, x.shape[:2])


@system(
    key="rcmha",
    title="RCMHA: Relative Convolutional Multi-Head Attention for Natural Language Modelling",
    arxiv="2308.03429",
    year=2023,
    family="scored",
    role="module",
    cost="O(N^2 C)",
    fidelity="vectors",
    causal="optional",
    dims=(1,),
    limits="Sequences with their memory are at most max_distance long. Convolutions look back even without a mask.",
)
class RelativeConvolutionalAttention(nn.Module):
    """Relative attention with causal convolutions after the projections.

    Args:
        dim: channels C.
        heads: number of heads; must divide `dim`.
        max_distance: P, the longest sequence with its memory; the table has 2 P rows.
        kernel: tokens of a convolution.
        causal: whether a token sees only itself and what comes before.
        official: restart the convolution of queries behind the memory, as the authors' code does.
        backend: of `attend`.

    Raises:
        ArgumentError: naming the option.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        max_distance: int = 4096,
        kernel: int = 3,
        causal: bool = True,
        official: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        width = check_heads(dim, heads)
        check_int(max_distance, "max_distance", 1)
        check_int(kernel, "kernel", 1)
        self.dim, self.heads, self.max_distance, self.kernel = dim, heads, max_distance, kernel
        self.causal, self.official, self.backend = causal, official, backend
        self.query = nn.Linear(dim, dim, bias=False)
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim)
        self.query_conv = HeadConvolution(width, kernel)
        self.key_conv = HeadConvolution(width, kernel)
        self.value_conv = HeadConvolution(width, kernel)
        self.proj = nn.Linear(dim, dim)
        self.table = nn.Parameter(torch.zeros(2 * max_distance, heads, width))
        self.offset_bias = nn.Parameter(torch.zeros(2 * max_distance, heads))
        self.query_bias = nn.Parameter(torch.zeros(heads, width))

    @classmethod
    def for_workload(
        cls, *, dim: int, grid: Grid, heads: int, causal: bool = False
    ) -> "RelativeConvolutionalAttention":
        """Return a layer with a table for the length of the sequence.

        Raises:
            ArgumentError: naming `grid` when it is not a sequence.
        """
        if grid.ndim != 1:
            raise bad("grid", grid, "a grid with 1 axis", "Distances are counted along a sequence.")
        return cls(dim=dim, heads=heads, max_distance=grid.numel, causal=causal)

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        grid: Grid,
        *,
        memory: Float[Tensor, "b m c"] | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b n c"]:
        """Mix the tokens of a sequence.

        Args:
            x: tokens.
            grid: their geometry, one axis.
            memory: what stood before them, inputs of this layer; keys only.
            mask: as in `attend`, over memory and tokens.

        Raises:
            ArgumentError: naming `x`, `grid` or `memory`.
        """
        check_tokens(x, grid, self.dim, (1,))
        q, k, v = self._convolved(x, memory)
        return self._mix(q, k, v, mask)

    def attention_map(
        self,
        x: Float[Tensor, "b n c"],
        *,
        memory: Float[Tensor, "b m c"] | None = None,
        mask: Tensor | None = None,
    ) -> Float[Tensor, "b h n k"]:
        """Return the attention weights over memory and tokens, N x (M + N) of them per head."""
        q, k, _ = self._convolved(x, memory)
        eye = torch.eye(k.shape[2], dtype=x.dtype, device=x.device).expand(*k.shape[:2], -1, -1)
        return self._attend(q, k, eye, mask)

    def prefill(
        self, x: Float[Tensor, "b n c"], past: ConvolvedPast | None = None
    ) -> tuple[Float[Tensor, "b n c"], ConvolvedPast]:
        """Mix a stretch of tokens that follows `past`, and return the new past too.

        Raises:
            ArgumentError: naming `causal`, where later tokens would be needed, or `past`.
        """
        if not self.causal:
            raise bad("causal", self.causal, "True to decode", "Earlier tokens would see the new one.")
        raw = self._projected(x)
        if past is None:
            raw = F.pad(raw, (0, 0, self.kernel - 1, 0))
        else:
            if past.tail.shape[:2] != raw.shape[:2] or past.tail.shape[3] != raw.shape[3]:
                shown = tuple(past.tail.shape)
                raise bad("past", shown, "what prefill or step returned for this batch and layer")
            raw = torch.cat([past.tail, raw], dim=2)
        q, k, v = self._conv(raw)
        if past is not None:
            k, v = torch.cat([past.k, k], dim=2), torch.cat([past.v, v], dim=2)
        past = ConvolvedPast(k, v, raw[:, :, raw.shape[2] - (self.kernel - 1) :])
        return self._mix(q, k, v, None), past

    def step(
        self, x: Float[Tensor, "b c"], past: ConvolvedPast | None = None
    ) -> tuple[Float[Tensor, "b c"], ConvolvedPast]:
        """Decode one token."""
        if length(past) >= self.max_distance:
            raise bad("past", length(past), f"fewer than max_distance={self.max_distance} tokens")
        out, past = self.prefill(x.unsqueeze(1), past)
        return out.squeeze(1), past

    def _projected(self, x: Tensor) -> Float[Tensor, "b h n d3"]:
        """Return projections side by side in each head: q, k, v."""
        parts = [split_heads(project(x), self.heads) for project in (self.query, self.key, self.value)]
        return torch.cat(parts, dim=-1)

    def _conv(self, raw: Float[Tensor, "b h n d3"]) -> list[Tensor]:
        parts = raw.chunk(3, dim=-1)
        convolutions = (self.query_conv, self.key_conv, self.value_conv)
        return [convolve(part) for convolve, part in zip(convolutions, parts, strict=True)]

    def _convolved(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        whole = x
        if memory is not None:
            if memory.ndim != 3 or (memory.shape[0], memory.shape[2]) != (x.shape[0], x.shape[2]):
                raise bad("memory", tuple(memory.shape), f"({x.shape[0]}, tokens, {x.shape[2]})")
            whole = torch.cat([memory, x], dim=1)
        start = whole.shape[1] - x.shape[1]
        raw = F.pad(self._projected(whole), (0, 0, self.kernel - 1, 0))
        q, k, v = self._conv(raw)
        q = q[:, :, start:]
        if self.official and start:
            restarted = F.pad(split_heads(self.query(x), self.heads), (0, 0, self.kernel - 1, 0))
            q = self.query_conv(restarted)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n_q, n_k, middle = q.shape[2], k.shape[2], self.max_distance
        if n_k > middle:
            raise bad("x", f"{n_k} tokens with the memory", f"at most max_distance={middle}")
        first, last = 1 - n_k, 0 if self.causal else n_q - 1
        rows = slice(middle + first, middle + last + 1)
        scale = q.shape[3] ** -0.5
        by_offset = q @ self.table[rows].permute(1, 2, 0) + self.offset_bias[rows].T.unsqueeze(1)
        return attend(
            q + self.query_bias.unsqueeze(1),
            k,
            v,
            where=Causal() if self.causal else None,
            score=RelativeLogits(scale * by_offset, first),
            mask=mask,
            scale=scale,
            backend=self.backend,
        )

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.proj(merge_heads(self._attend(q, k, v, mask)))

    def extra_repr(self) -> str:
        """Show the options."""
        return (
            f"dim={self.dim}, heads={self.heads}, max_distance={self.max_distance}, kernel={self.kernel}, "
            f"causal={self.causal}, official={self.official}"
        )
