"""See which scans a piece of code runs, so that a whole module can be priced without knowing its inside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.kernels.scan.cost import Decay, scan_cost


@dataclass(frozen=True)
class ScanCall:
    """The shapes of one call of `scan`.

    Attributes:
        batch, heads, n, dk, dv: of q (batch, heads, n, dk) and v (batch, heads, n, dv).
        decay: "none", "head", "token" or "channel", as `scan_cost` calls them.
        directions: 1, or 2 where tokens see what is after them too.
        backend: the form that runs: "chunk", "cpu" (the C++ core), "recurrent" or "reference".
        chunk: tokens per chunk of the form "chunk" or "cpu".
        itemsize: bytes per element of q, k and v.
    """

    batch: int
    heads: int
    n: int
    dk: int
    dv: int
    decay: Decay
    directions: int
    backend: str
    chunk: int
    itemsize: int

    @property
    def flops(self) -> int:
        """Operations in matrix products of the forward pass, of the chunk form whichever form ran."""
        if self.directions == 2 and self.decay == "none":
            return 4 * self.batch * self.heads * self.n * self.dk * self.dv
        return self.directions * self._cost().flops

    @property
    def state_bytes(self) -> int:
        """Bytes of the state that travels from token to token; none where tokens see both ways."""
        return self._cost().state_bytes if self.directions == 1 else 0

    @property
    def step_flops(self) -> int:
        """Operations of one token decoded: a pair into the state, and a query on it, for every sample and head."""
        return 4 * self.batch * self.heads * self.dk * self.dv

    def _cost(self):
        return scan_cost(
            batch=self.batch,
            heads=self.heads,
            n=self.n,
            dk=self.dk,
            dv=self.dv,
            decay=self.decay,
            chunk=self.chunk,
            itemsize=self.itemsize,
        )


_WATCHERS: list[list[ScanCall]] = []


@contextmanager
def watch_scans() -> Iterator[list[ScanCall]]:
    """Collect the calls of `scan` inside the `with` block, in order. Compiled code is not seen."""
    seen: list[ScanCall] = []
    _WATCHERS.append(seen)
    try:
        yield seen
    finally:
        # By identity: lists of calls may be equal.
        _WATCHERS[:] = [w for w in _WATCHERS if w is not seen]


def tell_watchers(
    q: Tensor, v: Tensor, decay: Tensor | None, *, causal: object, backend: str, chunk: int, itemsize: int
) -> None:
    """Hand a call that is about to run to everybody in `watch_scans`.

    Args:
        q, v: (B, H, N, D) as computed.
        decay: (B|1, H|1, N|1, D_k|1) or None.
        causal, backend, chunk: as given to `scan`, the backend decided.
        itemsize: bytes per element as given.
    """
    if not _WATCHERS or torch.compiler.is_compiling():
        return
    kind: Decay = "none"
    if decay is not None:
        kind = "channel" if decay.shape[3] > 1 else "token" if decay.shape[2] > 1 else "head"
    batch, heads, n, dk = q.shape
    call = ScanCall(
        batch, heads, n, dk, v.shape[3], kind, 2 if causal is False else 1, backend, chunk, itemsize
    )
    for seen in _WATCHERS:
        seen.append(call)
