"""The chunk form of the scan: matrix products inside chunks of tokens, a short recurrence between them.

Inside a chunk every pair of tokens gets its weight at once; between chunks only the state travels.
Log decays are only ever *added*, never subtracted: a chunk is built from halves, where a query of the
later half reaches a key of the earlier half through (sum from the middle to the query) + (sum from the
key to the middle). Both are <= 0, so nothing can overflow, -inf (a full reset) needs no special case,
and small decays keep their digits beside huge ones. The same doubling serves one decay per token, where
it builds the table of weights, and one per channel, where the two parts are put on q and on k.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from foveate.kernels.scan.contract import ScanProblem

# Numbers per tensor of the chunks that are computed together. Few enough that they stay in cache and that memory
# beside inputs and outputs does not grow with N; enough that every matrix product is a large batch.
TOGETHER = 1 << 18


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
        q, k, v = (x.unflatten(2, (m, c)) for x in (q, k, v))
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
        g: (b, h, m, padded c, 1|dk) log decays; zeros behind the tokens up to a power of two.
        weights: for one decay per token the table of weights (b, h, m, c, c); None for one per channel,
            where the table would need an axis more and `_channel_scores` takes its place.
        since, until: log decays from the chunk's start through each token, and from after it to the
            chunk's end, (b, h, m, c, 1); None together with `weights`.
    """

    def __init__(self, g: Float[Tensor, "b h m c dg"]):
        c = g.shape[3]
        self.g = F.pad(g, (0, 0, 0, _power_of_two(c) - c))
        self.weights = self.since = self.until = None
        if g.shape[-1] == 1:
            table, since, until = _double(self.g)
            self.weights = table[..., :c, :c].exp()
            self.since, self.until = since[..., :c, :], until[..., :c, :]


def _plain(q: Tensor, k: Tensor, v: Tensor, state: Tensor, inclusive: bool) -> tuple[Tensor, Tensor]:
    """Whole chunks without decay: (b, h, m, c, d) in, (b, h, m, c, dv) and the next state out."""
    c = q.shape[-2]
    # A product with the triangle: several times faster here than tril of a large batch.
    seen = torch.ones(c, c, dtype=q.dtype, device=q.device).tril(0 if inclusive else -1)
    scores = (q @ k.mT) * seen
    before, state = _carry(None, k.mT @ v, state)
    return scores @ v + q @ before, state


def _decayed(
    q: Tensor, k: Tensor, v: Tensor, decays: _Decays, state: Tensor, inclusive: bool
) -> tuple[Tensor, Tensor]:
    """Whole chunks with decay."""
    if decays.weights is not None and decays.since is not None and decays.until is not None:
        scores, since, until = (q @ k.mT) * decays.weights, decays.since, decays.until
        if not inclusive:
            scores = scores.tril(-1)
    else:
        scores, since, until = _channel_scores(q, k, decays.g, inclusive)
    factor = since[..., -1, :].exp().unsqueeze(-1)
    before, state = _carry(factor, (k * until.exp()).mT @ v, state)
    return scores @ v + (q * since.exp()) @ before, state


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


def _double(g: Float[Tensor, "*batch c 1"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the table L[i, j] = g_{j+1} + ... + g_i (-inf above the diagonal), and the sums along it.

    Returns:
        table (..., c, c); since (..., c, 1) = g_1 + ... + g_i; until (..., c, 1) = g_{j+1} + ... + g_c.
        c must be a power of two.
    """
    since, until = g, torch.zeros_like(g)  # (..., blocks, tokens of a block), blocks of one at first
    table = torch.zeros_like(g).unsqueeze(-1)
    while since.shape[-2] > 1:
        (early, late), (early_to_end, late_to_end) = _halves(since, -2), _halves(until, -2)
        above, below = _halves(table, -3)
        cross = late.unsqueeze(-1) + early_to_end.unsqueeze(-2)
        nothing = torch.full_like(cross, -torch.inf)
        table = torch.cat([torch.cat([above, nothing], -1), torch.cat([cross, below], -1)], -2)
        since = torch.cat([early, early[..., -1:] + late], -1)
        until = torch.cat([early_to_end + late[..., -1:], late_to_end], -1)
    return table.squeeze(-3), since.mT, until.mT


def _channel_scores(q: Tensor, k: Tensor, g: Tensor, inclusive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scores A[i, j] = sum_d q[i, d] k[j, d] exp(g_{j+1, d} + ... + g_{i, d}) of every chunk.

    Args:
        q, k: (b, h, m, c, dk).
        g: (b, h, m|1, padded c, dk), the padded length a power of two.

    Returns:
        scores (b, h, m, c, c), zero above the diagonal, and the sums `since`, `until` (b, h, m|1, c, dk).
    """
    c, padded = q.shape[3], g.shape[3]
    q, k = (F.pad(x, (0, 0, 0, padded - c)) for x in (q, k))
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
