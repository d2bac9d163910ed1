"""The chunk form of the scan: matrix products inside chunks of tokens, a short recurrence between them.

Inside a chunk every pair of tokens gets its weight at once; between chunks only the state travels.

One decay per token: the table of weights comes from running sums in float64, whose differences keep more digits
than float32 has; what is smaller than exp(-800) is nothing, and is cut so that a full reset (-inf) has a sum too.
One decay per channel: there is no such table, and log decays are only ever *added*. A chunk is built from halves,
where a query of the later half reaches a key of the earlier half through (sum from the middle to the query) + (sum
from the key to the middle), one part put on q and one on k. Both are <= 0, so nothing can overflow and -inf needs
no special case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.scan.contract import ScanProblem

# Numbers per tensor of the chunks that are computed together. Few enough that they stay in cache and that memory
# beside inputs and outputs does not grow with N; enough that every matrix product is a large batch.
TOGETHER = 1 << 17

# A log decay that leaves nothing, in float64 either; finite, so that sums of it have differences.
NOTHING = -800.0


def run(p: ScanProblem, chunk: int = 64) -> tuple[Float[Tensor, "b h n dv"], Float[Tensor, "b h dk dv"]]:
    """Compute outputs and final state in O(N (chunk + D_k) D) time with N / chunk short sequential steps."""
    if p.n == 0:
        return p.v, p.state
    sizes, chunks = _pieces(p.n, chunk, together(p, chunk))
    state, outs = p.state, _Outputs(p.n)
    constant = p.decay is not None and p.decay.shape[2] == 1
    shared: dict[int, _Decays] = {}
    # One split each, not slices: the gradient of every slice would be a tensor of full length.
    steps = [None] * len(sizes) if p.decay is None or constant else p.decay.split(sizes, dim=2)
    pieces = zip(*(x.split(sizes, dim=2) for x in (p.q, p.k, p.v)), steps, chunks, strict=True)
    for q, k, v, g, c in pieces:
        m = q.shape[2] // c
        # Copied once here where they are pieces of longer ones, not in every product.
        q, k, v = (x.unflatten(2, (m, c)).contiguous() for x in (q, k, v))
        if p.decay is None:
            out, state = _plain(q, k, v, state, p.inclusive)
        else:
            if g is not None:
                decays = _Decays(g.unflatten(2, (m, c)))
            elif c in shared:
                decays = shared[c]
            else:
                decays = shared[c] = _Decays(p.decay.unsqueeze(3).expand(-1, -1, 1, c, -1))
            out, state = _decayed(q, k, v, decays, state, p.inclusive)
        outs.append(out.flatten(2, 3))
    return outs.join(), state


def run_alone(p: ScanProblem) -> Float[Tensor, "b h n dv"]:
    """Compute the outputs of a short sequence as one chunk, where nothing came before and nothing follows."""
    scores = p.q @ p.k.mT
    if p.decay is not None:
        weights = _Decays(p.decay.unsqueeze(2).expand(-1, -1, -1, p.n, -1)).weights
        scores = scores * weights.squeeze(2)  # type: ignore[union-attr]
    if p.decay is None or not p.inclusive:
        scores = scores.tril(0 if p.inclusive else -1)
    return scores @ p.v


def run_everywhere(p: ScanProblem) -> Float[Tensor, "b h n dv"]:
    """Both directions without decay: every token sees the one sum over all tokens."""
    return p.q @ (p.k.mT @ p.v)


def together(p: ScanProblem, chunk: int) -> int:
    """How many chunks are computed at once."""
    heads = p.q.shape[0] * p.q.shape[1]
    return max(1, TOGETHER // max(1, heads * chunk * max(p.q.shape[3], p.v.shape[3], chunk)))


class _Outputs:
    """Outputs of the pieces, side by side on axis 2.

    Without a gradient they are written where they belong at once: pieces that wait to be joined are memory that
    the system has to hand out first, and more of it with every token.
    """

    def __init__(self, n: int):
        self.n, self.at = n, 0
        self.parts: list[Tensor] = []
        self.whole: Tensor | None = None

    def append(self, part: Tensor) -> None:
        size = part.shape[2]
        if self.whole is None:
            if size == self.n or part.requires_grad or self.parts:
                self.parts.append(part)
                return
            self.whole = part.new_empty((*part.shape[:2], self.n, part.shape[3]))
        self.whole[:, :, self.at : self.at + size] = part
        self.at += size

    def join(self) -> Tensor:
        if self.whole is not None:
            return self.whole
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, dim=2)


def _pieces(n: int, chunk: int, count: int) -> tuple[list[int], list[int]]:
    """Tokens of each piece, and of each of its chunks: runs of whole chunks, then the rest as one chunk."""
    runs, rest = divmod(n - n % chunk, count * chunk)
    sizes = [count * chunk] * runs + [rest] * (rest > 0)
    chunks = [chunk] * len(sizes)
    if n % chunk:
        sizes.append(n % chunk)
        chunks.append(n % chunk)
    return sizes, chunks


class _Decays:
    """What is needed of the log decays of m chunks of c tokens.

    Attributes:
        g: (b, h, m, c, 1|dk) log decays.
        weights: for one decay per token the table of weights (b, h, m, c, c), zero above the diagonal; None for one
            per channel, where the table would need an axis more and `_channel_scores` takes its place.
        since, until: what is left of the state before the chunk at each token, and of each token's pair at the end
            of the chunk, (b, h, m, c, 1); None together with `weights`.
        factor: what the whole chunk leaves of a state, (b, h, m, 1, 1), or None.
    """

    def __init__(self, g: Float[Tensor, "b h m c dg"]):
        self.g = g
        self.weights = self.since = self.until = self.factor = None
        if g.shape[-1] > 1:
            return
        c = g.shape[3]
        total = g.double().clamp(min=NOTHING).squeeze(-1).cumsum(-1)
        above = torch.full((c, c), -torch.inf, dtype=g.dtype, device=g.device).triu(1)
        self.weights = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(g.dtype).add_(above).exp_()
        last = total[..., -1:]
        self.since = total.to(g.dtype).exp().unsqueeze(-1)
        self.until = (last - total).to(g.dtype).exp().unsqueeze(-1)
        self.factor = last.to(g.dtype).exp().unsqueeze(-1)


def _plain(q: Tensor, k: Tensor, v: Tensor, state: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    """Whole chunks without decay: (b, h, m, c, d) in, (b, h, m, c, dv) and the next state out."""
    c = q.shape[-2]
    # A product with the triangle: several times faster here than tril of a large batch.
    seen = torch.ones(c, c, dtype=q.dtype, device=q.device).tril(0 if inclusive else -1)
    scores = (q @ k.mT) * seen
    before, state = _carry(None, k.mT @ v, state)
    return _sum(q, before, scores, v), state


def _decayed(
    q: Tensor, k: Tensor, v: Tensor, decays: _Decays, state: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    """Whole chunks with decay."""
    if decays.weights is not None and decays.since is not None and decays.until is not None:
        scores, since, until = (q @ k.mT) * decays.weights, decays.since, decays.until
        factor = decays.factor
        if not inclusive:
            scores = scores.tril(-1)
    else:
        scores, since, until = _channel_scores(q, k, decays.g, inclusive)
        since, until = since.exp(), until.exp()
        factor = since[..., -1, :].unsqueeze(-1)
    before, state = _carry(factor, (k * until).mT @ v, state)
    return _sum(q * since, before, scores, v), state


def _sum(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Return a @ b + c @ d, the second product added in place of the first."""
    lead = a.shape[:3]
    first = torch.bmm(a.flatten(0, 2), b.flatten(0, 2))
    return torch.baddbmm(first, c.flatten(0, 2), d.flatten(0, 2)).unflatten(0, lead)


def _carry(factor: Tensor | None, gain: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run the states through the chunks: S_{m+1} = factor_m S_m + gain_m.

    Args:
        factor: (b, h, m|1, dk|1, 1) or None.
        gain: (b, h, m, dk, dv).
        state: (b, h, dk, dv) before the first chunk.

    Returns:
        The state before every chunk (b, h, m, dk, dv), and the state after the last.
    """
    m = gain.shape[2]
    # unbind, not indexing: the gradient of m single selections would be m tensors of full size.
    gains = gain.unbind(2)
    factors = [None] * m if factor is None else factor.expand(-1, -1, m, -1, -1).unbind(2)
    before = []
    for a, u in zip(factors, gains, strict=True):
        before.append(state)
        state = u + state if a is None else torch.addcmul(u, a, state)
    return torch.stack(before, dim=2), state


def _channel_scores(q: Tensor, k: Tensor, g: Tensor, inclusive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores A[i, j] = sum_d q[i, d] k[j, d] exp(g_{j+1, d} + ... + g_{i, d}) of every chunk.

    Args:
        q, k: (b, h, m, c, dk).
        g: (b, h, m|1, c, dk).

    Returns:
        scores (b, h, m, c, c), zero above the diagonal, and the sums `since`, `until` (b, h, m|1, c, dk).
    """
    c, padded = q.shape[3], _power_of_two(q.shape[3])
    q, k, g = (F.pad(x, (0, 0, 0, padded - c)) for x in (q, k, g))
    own = (q * k).sum(-1) if inclusive else torch.zeros_like(q[..., 0])
    scores = own[..., None, None]  # (..., blocks, size, size), blocks of one token at first
    since, until = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)
    size = 1
    while size < padded:
        early_q_late = q.unflatten(-2, (padded // (2 * size), 2, size))[..., 1, :, :]
        late_k_early = k.unflatten(-2, (padded // (2 * size), 2, size))[..., 0, :, :]
        (early, late), (early_to_end, late_to_end) = _halves(since, -3), _halves(until, -3)
        cross = (early_q_late * late.exp()) @ (late_k_early * early_to_end.exp()).mT
        above, below = _halves(scores, -3)
        nothing = torch.zeros_like(cross)
        scores = torch.cat([torch.cat([above, nothing], -1), torch.cat([cross, below], -1)], -2)
        since = torch.cat([early, early[..., -1:, :] + late], -2)
        until = torch.cat([early_to_end + late[..., -1:, :], late_to_end], -2)
        size *= 2
    return scores.squeeze(-3)[..., :c, :c], since.squeeze(-3)[..., :c, :], until.squeeze(-3)[..., :c, :]


def _halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Split the blocks along `dim` into the earlier and the later ones of each neighbouring pair."""
    paired = x.unflatten(dim, (x.shape[dim] // 2, 2))
    return paired.select(dim, 0), paired.select(dim, 1)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()
