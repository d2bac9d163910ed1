"""One mechanism made ready to be measured: a built module, the geometry it was built for, and its inputs.

Token mechanisms take (B, N, C) and a Grid, spatial gates take (B, C, *spatial). Everything that measures
goes through `Subject`, which hides that difference and nothing else.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import Facts
from foveate.kernels.select import watch_plans
from foveate.measure.timer import Timed


@dataclass
class Subject:
    """A mechanism under measurement.

    Attributes:
        key: its name in the registry.
        module: the built mechanism.
        grid: the geometry of its tokens.
        dim: channels C.
        layout: "tokens" or "spatial".
    """

    key: str
    module: nn.Module
    grid: Grid
    dim: int
    layout: str = "tokens"

    @classmethod
    def build(cls, facts: Facts, *, dim: int, grid: Grid, heads: int, causal: bool = False) -> Subject:
        """Build a registered system through its own `for_workload`.

        Raises:
            ArgumentError, UnsupportedError: the mechanism's own reason why it can't do this workload.
        """
        maker: Any = facts.cls
        module = maker.for_workload(dim=dim, grid=grid, heads=heads, causal=causal)
        return cls(key=facts.key, module=module, grid=grid, dim=dim, layout=facts.layout)

    @property
    def device(self) -> torch.device:
        """Where the module's parameters are (the CPU when it has none)."""
        first = next(self.module.parameters(), None)
        return first.device if first is not None else torch.device("cpu")

    @property
    def params(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.module.parameters() if p.requires_grad)

    def to(self, *args: Any) -> Subject:
        """A deep copy moved to a device or dtype."""
        return Subject(self.key, copy.deepcopy(self.module).to(*args), self.grid, self.dim, self.layout)

    def sample(
        self, batch: int = 1, *, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> Float[Tensor, "b ..."]:
        """Standard normal input in the mechanism's layout, the same for the same seed on every device."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, self.grid.numel, self.dim, generator=generator, dtype=torch.float64)
        return self.arrange(x.to(self.device, dtype))

    def arrange(self, tokens: Float[Tensor, "b n c"]) -> Float[Tensor, "b ..."]:
        """Tokens (B, N, C) in the mechanism's own layout."""
        if self.layout == "tokens":
            return tokens
        return tokens.transpose(1, 2).reshape(len(tokens), self.dim, *self.grid.sizes).contiguous()

    def tokens(self, y: Float[Tensor, "b ..."]) -> Float[Tensor, "b n c"]:
        """The inverse of `arrange`, for outputs."""
        return y if self.layout == "tokens" else y.flatten(2).transpose(1, 2)

    def __call__(self, x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Run the mechanism on an input of its own layout."""
        return self.module(x, self.grid) if self.layout == "tokens" else self.module(x)

    def forward_call(self, x: Float[Tensor, "b ..."]) -> Timed:
        """Inference forward pass, without autograd."""

        def run() -> Tensor:
            with torch.no_grad():
                return self(x)

        return Timed(run)

    def backward_call(self, x: Float[Tensor, "b ..."]) -> Timed:
        """Backward pass alone; its forward pass is prepared off the clock."""

        def prepare() -> tuple[Tensor, Tensor]:
            self.module.zero_grad(set_to_none=True)
            y = self(x.detach().requires_grad_())
            return y, torch.ones_like(y)

        def run(pair: tuple[Tensor, Tensor]) -> None:
            pair[0].backward(pair[1])

        return Timed(run, prepare)

    def backends(self, x: Float[Tensor, "b ..."]) -> list[str]:
        """The backends of `attend` that a forward pass runs on, sorted; empty where it never calls it."""
        with watch_plans() as plans, torch.no_grad():
            self(x)
        return sorted({plan.backend for plan in plans})

    def forward_call_on(self, x: Float[Tensor, "b ..."], backend: str) -> Timed:
        """`forward_call` with every part asked for one backend; raises where a part cannot use it."""

        def run() -> Tensor:
            with self.backend(backend) as chosen, torch.no_grad():
                if not chosen:
                    raise UnsupportedError(f"no part of {self.key} has a choice of backend")
                return self(x)

        return Timed(run)

    def step(self, x: Float[Tensor, "b ..."]) -> None:
        """One forward and backward pass, for measuring memory; gradients are dropped afterwards."""
        self(x.detach().requires_grad_()).sum().backward()
        self.module.zero_grad(set_to_none=True)

    @contextmanager
    def backend(self, name: str) -> Iterator[bool]:
        """Ask every part that chooses a backend for `name`; yields whether any part has that choice."""
        parts = [m for m in self.module.modules() if isinstance(getattr(m, "backend", None), str)]
        before = [part.backend for part in parts]
        for part in parts:
            part.backend = name  # type: ignore[assignment]
        try:
            yield bool(parts)
        finally:
            for part, old in zip(parts, before, strict=True):
                part.backend = old  # type: ignore[assignment]
