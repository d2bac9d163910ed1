"""Train one network on one workload, step by step, so that a race can pause, compare and go on.

AdamW with linear warm-up, then a constant rate; what is evaluated is a running mean of the weights.
That way every step count is a fair place to stop: no schedule has to know how long the race will be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.models.backbone import Backbone
from foveate.tasks.workload import Evaluation, Workload

# Steps that the running mean of the weights remembers at least.
SHORTEST_MEMORY = 5


class DivergedError(FoveateError, ArithmeticError):
    """The loss stopped being a finite number."""


class Trainer:
    """One network in training.

    Args:
        workload: data, loss and scores.
        build: makes the network, `build(spec, seed=)`; on the CPU, moved afterwards.
        seed: fixes initial weights and data order.
        device: where to train.
        dtype: dtype of weights and activations.

    Attributes:
        step: optimiser steps done.
        seconds: wall-clock time spent in them (evaluations excluded).
    """

    def __init__(
        self,
        workload: Workload,
        build: Callable[..., Backbone],
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.workload = workload
        self.recipe = workload.recipe
        self.seed = seed
        self.device = torch.device(device)
        self.dtype = dtype
        self.model = build(workload.spec, seed=seed).to(self.device, dtype)
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        position = getattr(self.model, "position", None)
        decayed = [p for p in matrices if p is not position]
        rest = [p for p in self.model.parameters() if p.requires_grad and not any(p is d for d in decayed)]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.recipe.weight_decay},
                {"params": rest, "weight_decay": 0.0},
            ],
            lr=self.recipe.lr,
            betas=self.recipe.betas,
        )
        self.average = {name: value.detach().clone() for name, value in self._state()}
        self.step = 0
        self.seconds = 0.0

    def _state(self) -> list[tuple[str, Tensor]]:
        """Parameters and floating buffers: what the running mean covers."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [(name, value) for name, value in named if value.is_floating_point()]

    def advance(self, steps: int) -> float:
        """Do `steps` optimiser steps; return the mean training loss over them.

        Raises:
            DivergedError: the loss is not finite.
        """
        self.model.train()
        started = time.perf_counter()
        # Mechanisms that draw (routers, dropout) draw the same whatever trained before them.
        with torch.random.fork_rng(devices=self._cuda_devices()):
            torch.manual_seed(7919 * (self.seed + 1) + self.step)
            total = sum(self._one() for _ in range(steps))
        self.seconds += time.perf_counter() - started
        return total / max(steps, 1)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _one(self) -> float:
        recipe = self.recipe
        rate = recipe.lr * min(1.0, (self.step + 1) / max(recipe.warmup, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.workload.batch(self.step, seed=self.seed).to(self.device, self.dtype)
        loss = self.workload.loss(self.model(batch.inputs).float(), batch)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(f"the loss became {value} at step {self.step}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.step += 1
        # The memory grows with the run: long, it would hold early progress back; short, keep late noise.
        share = 1.0 / min(self.step, max(SHORTEST_MEMORY, recipe.average * self.step))
        kept = list(self.average.values())
        torch._foreach_lerp_(kept, [value.detach() for _, value in self._state()], share)
        return value

    @torch.no_grad()
    def evaluate(self, *, size: int = 64) -> Evaluation:
        """Score the running mean of the weights on the workload's held-out examples."""
        own = {name: value.detach().clone() for name, value in self._state()}
        self._load(self.average)
        self.model.eval()
        try:
            return self.workload.evaluate(
                lambda inputs: self.model(
                    inputs.to(self.device, self.dtype if inputs.is_floating_point() else None)
                ),
                size=size,
            )
        finally:
            self._load(own)

    @torch.no_grad()
    def _load(self, state: dict[str, Tensor]) -> None:
        for name, value in self._state():
            value.copy_(state[name])

    def state_dict(self) -> dict[str, Any]:
        """Return everything that continuing exactly needs (tensors, numbers and plain containers)."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s value."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        self.step = int(state["step"])
        self.seconds = float(state["seconds"])
