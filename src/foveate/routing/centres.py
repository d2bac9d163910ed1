"""Token centres shared by all samples: clusters of directions, refined on every training batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad


def chunk_means(x: Float[Tensor, "b n c"], count: int, *, official: bool = False) -> Float[Tensor, "count c"]:
    """Return the means over batch and tokens of `count` contiguous pieces of the sequence.

    The sequence is lengthened to a multiple of `count` by the mirror image of its end.

    Args:
        x: tokens.
        count: number of pieces.
        official: lengthen it by `count` tokens where it is a multiple already, as the authors do.

    Raises:
        ArgumentError: naming `count`, when the sequence is too short to be mirrored.
    """
    n = x.shape[1]
    missing = count - n % count if official else -n % count
    if missing > n:
        raise bad("count", count, f"at most {2 * n} pieces of {n} tokens", "Use fewer centres.")
    whole = torch.cat([x, x[:, n - missing :].flip(1)], dim=1)
    return whole.unflatten(1, (count, -1)).mean((0, 2))


def nearest(x: Float[Tensor, "b n c"], centres: Float[Tensor, "m c"]) -> Int[Tensor, "b n"]:
    """Return the centre with the largest cosine for each token; no gradient."""
    x, centres = x.detach(), centres.detach()
    return (functional.normalize(x, dim=-1) @ functional.normalize(centres, dim=-1).mT).argmax(-1)


def moved(x: Float[Tensor, "b n c"], centres: Float[Tensor, "m c"]) -> Float[Tensor, "m c"]:
    """Return centres moved to the mean direction of their members in the batch: one step of spherical k-means.

    Unit vectors; a centre without members keeps its direction. Gradients flow into `x` through the members,
    not through the choice.
    """
    x, centres = functional.normalize(x, dim=-1), functional.normalize(centres, dim=-1)
    ids = nearest(x, centres).flatten()
    sums = torch.zeros_like(centres).index_add(0, ids, x.flatten(0, 1))
    counts = torch.zeros_like(centres[:, 0]).index_add(0, ids, torch.ones_like(x[..., 0]).flatten())
    return torch.where(counts[:, None] > 0, functional.normalize(sums, dim=-1), centres)


class SharedCentres(nn.Module):
    """Centres in a buffer that follow the training batches by an exponential moving average.

    In evaluation they are what the buffer holds, so that no sample depends on another. The first training
    batch sets them; before that they are random directions.

    Args:
        count: number of centres M.
        dim: channels C.
        iterations: steps of k-means on a training batch, >= 1.
        decay: of the moving average.
        official: start from contiguous pieces of the batch in evaluation too, as the authors do.
    """

    means: Tensor
    initted: Tensor

    def __init__(
        self, count: int, dim: int, *, iterations: int = 5, decay: float = 0.999, official: bool = False
    ):
        super().__init__()
        for name, value in (("count", count), ("dim", dim), ("iterations", iterations)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise bad(name, value, "a positive integer")
        if not 0 <= decay < 1:
            raise bad("decay", decay, "0 <= decay < 1")
        self.iterations, self.decay, self.official = iterations, decay, official
        self.register_buffer("means", torch.empty(count, dim))
        self.register_buffer("initted", torch.tensor(False))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random directions, and forget that a batch has been seen."""
        nn.init.normal_(self.means)
        self.means.copy_(functional.normalize(self.means, dim=-1))
        self.initted.fill_(False)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "m c"]:
        """Return the centres for a batch: refined on it in training mode, as they are otherwise.

        The last step alone carries gradients, into `x`. Nothing is stored; `follow` does that.
        """
        if not self.training and not self.official:
            return self.means.to(x.dtype)
        started = bool(self.initted)
        centres = self.means if started else chunk_means(x, len(self.means), official=self.official)
        centres = centres.detach().to(x.dtype)
        if not self.training:
            return centres
        for _ in range(self.iterations - 1):
            centres = moved(x.detach(), centres)
        return moved(x, centres)

    @torch.no_grad()
    def follow(self, centres: Float[Tensor, "m c"]) -> None:
        """Move the buffer towards the centres of a batch; the first batch sets it."""
        centres = centres.to(self.means.dtype)
        if bool(self.initted):
            self.means.lerp_(centres, 1 - self.decay)
        else:
            self.means.copy_(centres)
            self.initted.fill_(True)

    def extra_repr(self) -> str:
        """Show the sizes."""
        count, dim = self.means.shape
        return f"count={count}, dim={dim}, iterations={self.iterations}, decay={self.decay}"
