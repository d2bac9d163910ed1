"""What a system that scans costs beside full attention: state, operations per token, and from which length it pays.

Full attention of the same width is counted with causal pairs only, N (N + 1) / 2, as a kernel that skips the rest
computes them (all N^2 where the system looks both ways), and with its four C x C projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.core.errors import UnsupportedError, bad
from foveate.core.grid import Grid
from foveate.core.registry import get_system, list_systems
from foveate.cost.render import amount
from foveate.kernels.flops import count_flops
from foveate.kernels.scan.watch import ScanCall, watch_scans
from foveate.models.backbone import build_mixer


@dataclass(frozen=True)
class LinearCost:
    """One layer of a scanning system in numbers, for one sample. `str()` shows them as a table.

    Attributes:
        key: the system.
        dim: channels C.
        heads: of the system.
        n: tokens of the forward pass that was counted.
        causal: whether tokens see earlier ones only.
        calls: the scans of a forward pass.
        flops: operations in matrix products of a forward pass, everything included.
        itemsize: bytes per element of tokens; states take at least 4.
    """

    key: str
    dim: int
    heads: int
    n: int
    causal: bool
    calls: tuple[ScanCall, ...]
    flops: int
    itemsize: int

    @property
    def scan_flops(self) -> int:
        """Operations of the scans alone."""
        return sum(call.flops for call in self.calls)

    @property
    def flops_per_token(self) -> float:
        """Operations of a forward pass per token; the same at every length of whole chunks."""
        return self.flops / self.n

    @property
    def step_flops(self) -> float:
        """Operations of decoding one token: everything but the scans, and their steps."""
        return (self.flops - self.scan_flops) / self.n + sum(call.step_flops for call in self.calls)

    @property
    def state_bytes(self) -> int:
        """What decoding keeps, whatever the length; 0 for a system that sees both ways."""
        return sum(call.state_bytes for call in self.calls)

    @property
    def crossover(self) -> int:
        """The shortest length at which a layer of full attention takes more operations than this one."""
        return self.crossover_against(causal=self.causal)

    def crossover_against(self, *, causal: bool) -> int:
        """`crossover` against full attention with causal pairs only, or with all, whichever this layer has."""
        return self._beyond(self.flops_per_token - 8 * self.dim**2, causal)

    @property
    def scan_crossover(self) -> int:
        """The same for the mixing alone, without projections."""
        return self._beyond(self.scan_flops / self.n, self.causal)

    @property
    def cache_crossover(self) -> int:
        """The shortest length at which full attention's keys and values take more bytes than the state."""
        return self.state_bytes // self.cache_bytes(1) + 1

    def cache_bytes(self, n: int) -> int:
        """Keys and values that full attention of the same width keeps of `n` tokens."""
        return 2 * n * self.dim * self.itemsize

    def dense_flops(self, n: int) -> int:
        """Operations of a layer of full attention of the same width on `n` tokens."""
        pairs = n * (n + 1) // 2 if self.causal else n * n
        return 8 * self.dim**2 * n + 4 * self.dim * pairs

    def _beyond(self, per_token: float, causal: bool) -> int:
        """The shortest length at which the mixing of full attention takes more than this per token."""
        if causal:
            return max(1, int(per_token // (2 * self.dim)))
        return max(1, int(per_token // (4 * self.dim)) + 1)

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, text)."""
        per_token = f"{amount(self.flops_per_token, 'FLOP')} a token"
        mixing = f"{amount(self.scan_flops / self.n, 'FLOP')} of it in the scan"
        found = [
            ("layer", f"{self.key}, {self.dim} channels, {self.heads} heads, {self.n} tokens"),
            ("forward", f"{per_token}; {mixing}"),
        ]
        if self.causal:
            state, cache = (amount(x, "B") for x in (self.state_bytes, self.cache_bytes(self.n)))
            keys = f"keys and values of full attention {cache}, more from {self.cache_crossover} tokens on"
            found += [
                ("state", f"{state} a sample, at every length; {keys}"),
                ("decoding", f"{amount(self.step_flops, 'FLOP')} a token, at every length"),
            ]
        alone = f"from {self.scan_crossover} on without projections"
        found.append(
            ("crossover", f"full attention takes more FLOPs from {self.crossover} tokens on; {alone}")
        )
        return found

    def __str__(self) -> str:
        return "\n".join(f"{label:>15}  {text}" for label, text in self.rows())


def explain_linear(
    key: str,
    *,
    dim: int,
    grid: Grid,
    heads: int,
    dtype: torch.dtype = torch.float32,
    causal: bool | None = None,
) -> LinearCost:
    """Count one layer of a registered system that scans; shapes only, nothing is computed.

    Args:
        key: of the system.
        dim: channels.
        grid: its tokens.
        heads: of the system, if it has any.
        dtype: of the tokens.
        causal: whether its tokens see earlier ones only; None for what it can be, causal rather than not.

    Raises:
        UnknownNameError: no such system.
        ArgumentError: it does not scan, or cannot serve this width or grid.
        UnsupportedError: likewise, or its scans have no price: those of selective state spaces are no products.
    """
    facts = get_system(key)
    if not scans(key):
        names = ", ".join(f.key for f in list_systems() if scans(f.key))
        raise bad("mechanism", key, "a system that scans", f"These do: {names}.")
    if causal is None:
        causal = facts.causal != "no"
    with torch.random.fork_rng(devices=[]):
        module = build_mixer(key, dim=dim, grid=grid, heads=heads, causal=causal).to("meta", dtype).eval()
    x = torch.empty(1, grid.numel, dim, dtype=dtype, device="meta")
    with torch.no_grad(), watch_scans() as calls:
        try:
            flops = count_flops(module, x, grid)
        except RuntimeError as error:
            raise UnsupportedError(f"{key} cannot be counted from shapes alone: {error}") from error
    if not calls:
        raise UnsupportedError(f"{key} calls no `scan` whose operations are products of matrices")
    return LinearCost(key, dim, heads, grid.numel, causal, tuple(calls), flops, dtype.itemsize)


def scans(key: str) -> bool:
    """Return whether a system says that `scan` computes it, and can stand in a network."""
    facts = get_system(key)
    return "scan" in facts.primitive.split() and hasattr(facts.cls, "for_workload")
