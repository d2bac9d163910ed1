"""Decoding: what a mechanism keeps of the tokens before. Keys and values (`Past`), or their sum (`State`).

Modules offer `prefill(x (B, N, C), past=None) -> (out, past)` for a stretch of tokens that follows `past`, and
`step(x (B, C), past) -> (out, past)` for one. `past` is a value: no call changes the one it was given.
With keys and values: `attend(q, k, v, where=Causal(align="end"))`, in which the new queries stand at the end of
the keys. With a state: `scan(q, k, v, initial_state=past.sums, return_state=True)`.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad

P = TypeVar("P", bound=tuple[Any, ...])


class Past(NamedTuple):
    """Keys and values of all tokens so far, as attention reads them (rotated, normed).

    A mechanism that keeps more has a tuple of its own, of tensors with tokens on axis 2.
    """

    k: Float[Tensor, "b h n d"]
    v: Float[Tensor, "b h n e"]


class State(NamedTuple):
    """The sum over all tokens so far that a scan hands on: of one size, however many there were."""

    sums: Float[Tensor, "b h d e"]
    length: int


class Decodes:
    """A module that decodes: with `prefill(x, past)` it has `step` too."""

    def step(self: Any, x: Float[Tensor, "b c"], past: Any = None) -> tuple[Float[Tensor, "b c"], Any]:
        """Decode one token: `prefill` of a stretch of one.

        Args:
            x: the token.
            past: what `prefill` or `step` returned of the tokens before; None for none.

        Returns:
            Its output (B, C), and the past for the next token.
        """
        out, past = self.prefill(x.unsqueeze(1), past)
        return out.squeeze(1), past


def length(past: tuple[Any, ...] | None) -> int:
    """Return how many tokens came before: the position of the next one."""
    if past is None:
        return 0
    return past.length if isinstance(past, State) else past[0].shape[2]


def past_bytes(past: object) -> int:
    """Return the bytes of all tensors in a `Past`, a `State`, or any nesting of tuples and lists of them."""
    if isinstance(past, Tensor):
        return past.nbytes
    return sum(map(past_bytes, past)) if isinstance(past, tuple | list) else 0


def extend(past: P | None, new: P) -> P:
    """Return the past with what the new tokens bring behind it.

    Args:
        past: of the tokens before, None for none.
        new: of the new tokens; tokens are on axis 2 of every tensor.

    Raises:
        ArgumentError: naming `past`, when it is another kind, or batch, heads or widths differ.
    """
    if past is None:
        return new
    hint = "It is the second result of prefill or step."
    if type(past) is not type(new):
        raise bad("past", type(past).__name__, f"a {type(new).__name__}", hint)
    for old, more in zip(past, new, strict=True):
        if (*old.shape[:2], *old.shape[3:]) != (*more.shape[:2], *more.shape[3:]):
            expected = f"batch, heads and widths {(*more.shape[:2], *more.shape[3:])}"
            raise bad("past", tuple(old.shape), expected, hint)
    return type(new)(*(torch.cat([old, more], dim=2) for old, more in zip(past, new, strict=True)))
