"""Two layouts, one wrapper each way: tokens (B, N, C) with a Grid, and maps (B, C, *spatial).

With these every mechanism can sit in the place of every other, and be compared with it.
"""

from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import bad
from foveate.core.grid import Grid


class AsTokens(nn.Module):
    """A spatial module `inner(x (B, C, *spatial))` in the place of a token mechanism. See `as_tokens`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Float[Tensor, "b n c"], grid: Grid) -> Float[Tensor, "b n c"]:
        """Lay the tokens out on `grid`, apply `inner`, and flatten again.

        Raises:
            ArgumentError: naming `x`, unless it has three axes and as many tokens as `grid`.
        """
        if x.dim() != 3:
            raise bad("x", tuple(x.shape), "three axes, (batch, tokens, channels)")
        grid.check_tokens(x.shape[1], "x")
        y = self.inner(x.transpose(1, 2).unflatten(2, grid.sizes))
        return y.flatten(2).transpose(1, 2)


class AsSpatial(nn.Module):
    """A token mechanism `inner(x (B, N, C), grid)` in the place of a spatial module. See `as_spatial`."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Float[Tensor, "b c *spatial"]) -> Float[Tensor, "b c *spatial"]:
        """Flatten the map to tokens, apply `inner` on its grid, and lay the result out again.

        Raises:
            ArgumentError: naming `x`, unless it has 1 to 3 spatial axes.
        """
        if not 3 <= x.dim() <= 5:
            raise bad("x", tuple(x.shape), "(batch, channels, *spatial) with 1 to 3 spatial axes")
        grid = Grid(*x.shape[2:])
        y = self.inner(x.flatten(2).transpose(1, 2), grid)
        return y.transpose(1, 2).unflatten(2, grid.sizes)


def as_tokens(module: nn.Module) -> nn.Module:
    """Return a token mechanism, `forward(x (B, N, C), grid)`, around a spatial module.

    Undoes `as_spatial` instead of wrapping twice.
    """
    return module.inner if isinstance(module, AsSpatial) else AsTokens(module)


def as_spatial(module: nn.Module) -> nn.Module:
    """Return a spatial module, `forward(x (B, C, *spatial))`, around a token mechanism.

    Undoes `as_tokens` instead of wrapping twice.
    """
    return module.inner if isinstance(module, AsTokens) else AsSpatial(module)
