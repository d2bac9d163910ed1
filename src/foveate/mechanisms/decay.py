"""Causal linear attention whose heads forget at a constant rate each: what lightning attention's papers share.

o_t = sum_{j <= t} exp(-s_h (t - j)) (q_t . k_j) v_j
"""

from typing import Literal, overload

from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad
from foveate.kernels.scan.api import Backend, scan
from foveate.kernels.scan.contract import seen
from foveate.mechanisms.past import State, length
from foveate.scores.distance import alibi_slopes


@overload
def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    backend: Backend = "auto",
    chunk: int = 64,
) -> Tensor: ...
@overload
def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    backend: Backend = "auto",
    chunk: int = 64,
) -> tuple[Tensor, Tensor]: ...
def decayed_attention(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    slopes: Tensor | None = None,
    *,
    initial_state: Float[Tensor, "b h d e"] | None = None,
    return_state: bool = False,
    backend: Backend = "auto",
    chunk: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """The paper's operator: causal, decayed, unscaled, not normalised linear attention.

    Args:
        q, k: (B, H, N, D).
        v: (B, H, N, E).
        slopes: >= 0 per head, (H,) or the authors' (H, 1, 1); the decay per token is exp(-slope). None is
            no decay. They may carry gradients.
        initial_state: (B, H, D, E) from an earlier call.
        return_state: also return the state after the last token.
        backend, chunk: of `scan`.

    Returns:
        (B, H, N, E), and the state (B, H, D, E) if asked for.

    Raises:
        ArgumentError: naming `slopes`, or what `scan` refuses.
    """
    decay = None
    if slopes is not None:
        if q.ndim == 4 and tuple(slopes.shape) not in ((q.shape[1],), (q.shape[1], 1, 1)):
            raise bad(
                "slopes", tuple(slopes.shape), f"({q.shape[1]},) or ({q.shape[1]}, 1, 1), one slope per head"
            )
        if seen(slopes < 0):
            raise bad("slopes", float(slopes.min()), "numbers >= 0", "The decay is exp(-slope).")
        decay = -slopes.flatten()
    if return_state:
        return scan(
            q,
            k,
            v,
            decay=decay,
            initial_state=initial_state,
            return_state=True,
            backend=backend,
            chunk=chunk,
        )
    return scan(q, k, v, decay=decay, initial_state=initial_state, backend=backend, chunk=chunk)


def layer_slopes(heads: int, layer: int = 0, layers: int = 1) -> Float[Tensor, "h"]:
    """Return the slopes of one layer: ALiBi's, shrinking from the first layer to almost 0 in the last.

    Raises:
        ArgumentError: unless 0 <= layer < layers.
    """
    if not 0 <= layer < layers:
        raise bad("layer", layer, f"an index into layers={layers}")
    # A network of one layer has no last one to fade to; the authors' formula divides by zero there.
    return alibi_slopes(heads) * (1 - layer / max(layers - 1, 1) + 1e-5)


def carry_on(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b h n d"],
    v: Float[Tensor, "b h n e"],
    slopes: Tensor | None,
    past: State | None,
    *,
    backend: Backend = "auto",
    chunk: int = 64,
) -> tuple[Float[Tensor, "b h n e"], State]:
    """Apply `decayed_attention` to tokens that follow `past`; return its output and the new past."""
    out, sums = decayed_attention(
        q,
        k,
        v,
        slopes,
        initial_state=None if past is None else past.sums,
        return_state=True,
        backend=backend,
        chunk=chunk,
    )
    return out, State(sums, length(past) + q.shape[2])
