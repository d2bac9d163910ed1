"""Merging tokens by significance: sorted, those that matter least are merged into the fewest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import bad


def shares_of(n: int, levels: int) -> list[int]:
    """Return how many of `n` sorted tokens each level takes: halves, or a quarter, a half and a quarter.

    Raises:
        ArgumentError: naming `levels`, unless it is 1, 2 or 3.
    """
    cuts = {1: (0, 4), 2: (0, 2, 4), 3: (0, 1, 3, 4)}.get(levels)
    if cuts is None:
        raise bad("levels", levels, "1, 2 or 3 levels")
    bounds = [n * cut // 4 for cut in cuts]
    return [b - a for a, b in pairwise(bounds)]


class SignificanceMerge(nn.Module):
    """Sort tokens by significance and merge consecutive ones by learned sums, coarsely where little matters.

    Level l takes its share of the sorted tokens and makes one of every `rates[l]` of them: w_l . x + b_l, with
    one weight per place in the group, shared by all channels. A smaller last group is scaled up, so that equal
    weights 1 / rate are the mean there too.

    Args:
        rates: tokens merged into one, from the least to the most significant level; 1 to 3 levels.

    Raises:
        ArgumentError: naming `rates`.
    """

    def __init__(self, rates: Sequence[int]):
        super().__init__()
        if not 1 <= len(rates) <= 3 or any(
            isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in rates
        ):
            raise bad("rates", rates, "1 to 3 positive integers")
        self.rates = tuple(rates)
        self.levels = nn.ModuleList(nn.Linear(rate, 1) for rate in rates)

    def length(self, n: int) -> int:
        """Return how many tokens `n` become."""
        return sum(
            -(-share // rate) for share, rate in zip(shares_of(n, len(self.rates)), self.rates, strict=True)
        )

    def forward(
        self, x: Float[Tensor, "b n c"], significance: Float[Tensor, "b n"]
    ) -> Float[Tensor, "b m c"]:
        """Return the merged tokens, the least significant first. No gradient goes to `significance`.

        Tokens of equal significance stay in their order.
        """
        order: Int[Tensor, "b n"] = significance.detach().argsort(dim=1, stable=True)
        rows = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        parts = rows.split(shares_of(x.shape[1], len(self.rates)), dim=1)
        return torch.cat([_merge(part, level) for part, level in zip(parts, self.levels, strict=True)], dim=1)

    def extra_repr(self) -> str:
        """Show the rates."""
        return f"rates={self.rates}"


def _merge(x: Float[Tensor, "b n c"], level: nn.Module) -> Float[Tensor, "b m c"]:
    assert isinstance(level, nn.Linear)
    rate = level.in_features
    missing = -x.shape[1] % rate
    if missing:
        x = functional.pad(x, (0, 0, 0, missing))
    groups = x.unflatten(1, (-1, rate)) if x.shape[1] else x.new_zeros(x.shape[0], 0, rate, x.shape[2])
    out = level.weight[0] @ groups
    if missing:
        scale = torch.ones(out.shape[1], 1, dtype=out.dtype, device=out.device)
        scale[-1] = rate / (rate - missing)
        out = out * scale
    return out + level.bias
