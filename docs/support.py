"""The support matrix: every system is built and run, and the page says what happened."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from platform import machine

import torch

from docs.catalogue import has_picture, systems
from docs.files import DOCS, NOTICE, table
from foveate.core.errors import FoveateError
from foveate.core.grid import Grid
from foveate.core.registry import Facts
from foveate.measure.subject import Subject

GRIDS = {1: Grid(16), 2: Grid(8, 8), 3: Grid(4, 4, 4)}
DIM, HEADS, BATCH = 16, 2, 2


def _subject(facts: Facts, dim: int, *, causal: bool = False) -> Subject:
    torch.manual_seed(0)
    return Subject.build(facts, dim=DIM, grid=GRIDS[dim], heads=HEADS, causal=causal)


def _finite(y: torch.Tensor) -> bool:
    return bool(y.isfinite().all())


def _forward(facts: Facts, dim: int, dtype: torch.dtype = torch.float32) -> bool:
    subject = _subject(facts, dim).to(dtype)
    y = subject(subject.sample(BATCH, dtype=dtype))
    return y.dtype == dtype and _finite(y)


def _backward(facts: Facts, dim: int, dtype: torch.dtype = torch.float32) -> bool:
    subject = _subject(facts, dim).to(dtype)
    x = subject.sample(BATCH, dtype=dtype).requires_grad_()
    subject(x).square().mean().backward()
    return x.grad is not None and _finite(x.grad)


def _compiles(facts: Facts, dim: int) -> bool:
    subject = _subject(facts, dim)
    subject.module.eval()
    x = subject.sample(1)
    torch._dynamo.reset()
    compiled = torch.compile(subject.module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        y = compiled(x, subject.grid) if subject.layout == "tokens" else compiled(x)
        return torch.allclose(y, subject(x), rtol=1e-4, atol=1e-5)


def _causal(facts: Facts) -> bool:
    """Perturb a token in the middle: what comes before it must not change."""
    dim = min(facts.dims)
    subject = _subject(facts, dim, causal=True).to(torch.float64)
    subject.module.eval()
    x = subject.sample(1, dtype=torch.float64)
    changed = subject.tokens(x).clone()
    middle = subject.grid.numel // 2
    changed[:, middle] += 1
    with torch.no_grad():
        before = subject.tokens(subject(x))
        after = subject.tokens(subject(subject.arrange(changed)))
    return torch.allclose(before[:, :middle], after[:, :middle], rtol=0, atol=1e-12)


def _tried(test: Callable[..., bool], *args: object) -> str:
    """Return "yes", "no" for a refusal by name, or what went wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return "yes" if test(*args) else "wrong"
    except FoveateError:
        return "no"
    except Exception as error:
        return f"fails ({type(error).__name__})"


def row(facts: Facts) -> list[str]:
    """Run one system through everything."""
    home = 2 if 2 in facts.dims else facts.dims[0]
    return [
        f"[`{facts.key}`](catalogue.md#{facts.key})",
        *(_tried(_forward, facts, dim) for dim in (1, 2, 3)),
        _tried(_backward, facts, home),
        _tried(_backward, facts, home, torch.float64),
        _tried(_backward, facts, home, torch.bfloat16),
        _tried(_compiles, facts, home),
        _tried(_causal, facts),
    ]


HEAD = ["system", "1-d", "2-d", "3-d", "backward", "float64", "bfloat16", "torch.compile", "causal"]


def page() -> str:
    """Return docs/support.md."""
    release = torch.__version__.split("+")[0]
    layers = [facts for facts in systems() if has_picture(facts)]
    others = ", ".join(f"[`{f.key}`](catalogue.md#{f.key})" for f in systems() if not has_picture(f))
    absent = f"Not in the table, as they read from sources of their own: {others}.\n\n" if others else ""
    text = (
        "# Support matrix\n\n"
        f"Made by running every system, as `for_workload` builds it, on small inputs on a CPU ({machine()}, "
        f"torch {release}). `no` is a refusal that names the reason; the module says it when it is built.\n\n"
        "- 1-d, 2-d, 3-d: forward in float32 on grids of that many axes.\n"
        "- backward: finite gradients in float32; float64 and bfloat16: forward and backward in that dtype.\n"
        "- torch.compile: backend `aot_eager` with `fullgraph=True`, equal to eager.\n"
        "- causal: in a causal module, changing one token leaves all outputs before it as they were.\n\n"
        "Only CPUs have been tried so far: nothing here says anything about GPUs.\n\n"
    )
    return NOTICE.format("docs.generate") + text + absent + table(HEAD, [row(facts) for facts in layers])


def files() -> dict[Path, str]:
    """Return the page."""
    return {DOCS / "support.md": page()}
