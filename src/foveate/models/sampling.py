"""Draw the next token from a language model's logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from foveate.core.errors import bad


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise an ArgumentError naming the option of `draw_token` that cannot be."""
    if not temperature >= 0:
        raise bad("temperature", temperature, "a number >= 0", "0 takes the most likely token.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise bad("top_k", top_k, "a positive number of tokens, or None for all")
    if top_p is not None and not 0 < top_p <= 1:
        raise bad("top_p", top_p, "a probability in (0, 1], or None for 1")


def draw_token(
    logits: Float[Tensor, "b v"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "b"]:
    """Draw one token per row from softmax(logits / temperature), cut to the likely ones.

    Args:
        logits: (B, V), of any float dtype; probabilities are float32 or wider.
        temperature: below 1 prefers likely tokens; 0 takes the most likely one, the first of equals.
        top_k: only the k most likely tokens.
        top_p: of these, only the fewest whose probability sums to at least this much; never none.
        generator: fixes the draw; it lives on the logits' device.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.ndim != 2:
        raise bad("logits", tuple(logits.shape), "(batch, vocabulary)")
    if temperature == 0:
        return logits.argmax(-1)
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.to(torch.promote_types(ordered.dtype, torch.float32)) / temperature
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    weights = ordered.softmax(-1)
    if top_p is not None:
        # A token stays while those before it have not reached top_p; before the first there are none.
        before = weights.cumsum(-1) - weights
        weights = weights.masked_fill(before >= top_p, 0.0)
    return tokens.gather(-1, torch.multinomial(weights, 1, generator=generator)).squeeze(-1)
