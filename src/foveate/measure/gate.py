"""The correctness gate: before any figure of a mechanism is printed, its fast path is checked for truth.

Four questions, each answered with a number and a limit: is everything finite, is the error against the same
computation in float64 within budget (at most 2x, for gradients 3x, that of the plain reference path in
the same dtype), does one sample's output ignore its neighbours in the batch, and (in causal workloads)
does no output see the future.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.measure.subject import Subject

# Errors below a few units in the last place of the largest entry are rounding, whoever makes them.
_FLOOR_ULPS = {"output": 32.0, "gradient": 128.0}
# The same computation cannot be told from rounding below this many units; used where a mechanism has
# no second, plain path to be measured against.
_SELF_ULPS = {"output": 4096.0, "gradient": 16384.0}
# A unit of a 16-bit format is a hundredth: sums are kept in float32 there, and few units are lost.
_HALF_SHARE = 1 / 16
_FACTOR = {"output": 2.0, "gradient": 3.0}


@dataclass(frozen=True)
class Check:
    """One question of the gate: `value` must not pass `limit`."""

    name: str
    ok: bool
    value: float
    limit: float
    sentence: str


@dataclass(frozen=True)
class Gate:
    """All checks of one mechanism; green when each is."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether figures may be printed."""
        return all(check.ok for check in self.checks)

    @property
    def reason(self) -> str:
        """The failed checks as one sentence, or ""."""
        return "; ".join(check.sentence for check in self.checks if not check.ok)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"ok": self.ok, "checks": [asdict(check) for check in self.checks]}


def _run(subject: Subject, x: Tensor, direction: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of <output, direction> with respect to the input and every parameter."""
    subject.module.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    out = subject(leaf)
    out.backward(direction.to(out))
    gradients = {n: p.grad for n, p in subject.module.named_parameters() if p.grad is not None}
    if leaf.grad is not None:
        gradients["input"] = leaf.grad
    return out.detach(), {n: g.detach().double() for n, g in gradients.items()}


def _distance(got: Tensor, truth: Tensor) -> float:
    return (got.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def _budget(
    kind: str, fast: dict[str, Tensor], plain: dict[str, Tensor] | None, truth: dict[str, Tensor], eps: float
) -> Check:
    """The worst tensor of `fast` against `truth`, measured in multiples of what it may err."""
    worst, worst_name, error_at, limit_at = 0.0, "", 0.0, 0.0
    if eps > 1e-4:
        eps *= _HALF_SHARE
    for name, exact in truth.items():
        size = exact.abs().max().item() if exact.numel() else 0.0
        error = _distance(fast[name], exact) if name in fast else float("inf")
        if plain is None:
            limit = _SELF_ULPS[kind] * eps * size
        else:
            limit = _FACTOR[kind] * _distance(plain[name], exact) + _FLOOR_ULPS[kind] * eps * size
        ratio = error / max(limit, 1e-300) if error else 0.0
        if not ratio <= worst:  # also true for nan
            worst, worst_name, error_at, limit_at = ratio, name, error, limit
    against = "float64" if plain is None else "float64 in multiples of the reference path's error"
    ok = worst <= 1.0
    whose = worst_name or "every tensor"
    said = f"{kind} error of {whose} {error_at:.2e} (limit {limit_at:.2e}) against {against}"
    return Check(f"{kind}_budget", ok, float(worst), 1.0, said)


def _finite(out: Tensor, gradients: dict[str, Tensor]) -> Check:
    bad = [name for name, value in {"output": out, **gradients}.items() if not value.isfinite().all()]
    said = f"not finite: {', '.join(bad)}" if bad else "output and gradients are finite"
    return Check("finite", not bad, float(len(bad)), 0.0, said)


def _shape(x: Tensor, out: Tensor) -> Check:
    same = x.shape == out.shape and x.dtype == out.dtype
    said = f"output {tuple(out.shape)} {out.dtype} for input {tuple(x.shape)} {x.dtype}"
    return Check("shape", same, 0.0 if same else 1.0, 0.0, said)


def _batch(subject: Subject, x: Tensor, out: Tensor, eps: float) -> Check:
    """Sample 0 alone against sample 0 among others."""
    with torch.no_grad():
        alone = subject(x[:1])
    error = _distance(alone, out[:1])
    limit = (256 if eps < 1e-4 else 4) * eps * max(out.abs().max().item(), 1e-30)
    return Check(
        "batch", error <= limit, error, limit, f"a sample's output moves by {error:.2e} with its batch"
    )


def causality_probe(subject: Subject, *, times: int = 3, seed: int = 0) -> Check:
    """Change every token from some place on and see whether an earlier output moves.

    Args:
        subject: the mechanism; run in evaluation mode in its own dtype.
        times: how many places are tried, spread over the sequence.
        seed: of the input and of the change.

    Returns:
        A check whose value is the largest movement of an output before the changed tokens, relative
        to the largest output. Exactly zero is not asked for: different batches of work round differently.
    """
    parameter = next(subject.module.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    x = subject.tokens(subject.sample(2, dtype=dtype, seed=seed))
    n = x.shape[1]
    was_training = subject.module.training
    subject.module.eval()
    worst, place = 0.0, 0
    with torch.no_grad():
        before = subject.tokens(subject(subject.arrange(x)))
        for i in range(times):
            t = max(1, min(n - 1, (i + 1) * n // (times + 1)))
            changed = x.clone()
            changed[:, t:] = 3.0 * torch.flip(x[:, t:], dims=(0,)) + 1.0
            after = subject.tokens(subject(subject.arrange(changed)))
            moved = _distance(after[:, :t], before[:, :t])
            if not moved <= worst:
                worst, place = moved, t
    subject.module.train(was_training)
    size = before.abs().max().item()
    eps = torch.finfo(dtype).eps
    limit = (1e3 if eps < 1e-4 else 4) * eps * max(size, 1e-30)
    said = (
        f"changing the tokens from {place} on moves earlier outputs by {worst:.2e}"
        if worst > limit
        else "no output sees the future"
    )
    return Check("causality", n < 2 or worst <= limit, worst, limit, said)


def check_mechanism(
    build: Callable[[], Subject],
    *,
    batch_coupled: bool = False,
    causal: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Gate:
    """Run the gate on one mechanism, on the device it was built on.

    Args:
        build: makes a fresh `Subject` at the size to be checked (small: the reference path is slow).
        batch_coupled: the registry's fact; such a mechanism is not asked to ignore its batch.
        causal: whether the workload is, which adds the causality probe.
        dtype: in which its figures will be taken.
        seed: of parameters and inputs.

    Returns:
        The gate; an exception inside a check is a failed check with the exception as its sentence.
    """
    checks: list[Check] = []
    try:
        torch.manual_seed(seed)
        subject = build()
        subject.module.to(dtype).eval()
        x = subject.sample(2, dtype=dtype, seed=seed + 1)
        direction = subject.sample(2, dtype=dtype, seed=seed + 2)
        out, gradients = _run(subject, x, direction)
        checks += [_shape(x, out), _finite(out, gradients)]
        exact = subject.to(torch.float64)
        exact.module.eval()
        eps = torch.finfo(x.dtype).eps
        with exact.backend("reference") as has_reference:
            truth, true_gradients = _run(exact, x.double(), direction.double())
        plain = plain_gradients = None
        if has_reference:
            slow = subject.to(dtype)
            with slow.backend("reference"):
                value, plain_gradients = _run(slow, x, direction)
            plain = {"output": value}
        checks.append(_budget("output", {"output": out}, plain, {"output": truth}, eps))
        checks.append(_budget("gradient", gradients, plain_gradients, true_gradients, eps))
        if not batch_coupled:
            checks.append(_batch(subject, x, out, eps))
        if causal:
            checks.append(causality_probe(subject, seed=seed + 3))
    except Exception as error:
        checks.append(Check("runs", False, 1.0, 0.0, f"{type(error).__name__}: {error}"))
    return Gate(tuple(checks))
