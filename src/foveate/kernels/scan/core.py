"""The chunk form in the C++ core: where it can run, where it is chosen, and its gradient's gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from foveate.core.errors import UnsupportedError
from foveate.core.tracing import constant_while_tracing
from foveate.kernels.cpu.library import absent
from foveate.kernels.cpu.scan import Scan, chunk_of
from foveate.kernels.cpu.scan_op import scan_chunks
from foveate.kernels.scan import chunk as chunk_form
from foveate.kernels.scan.contract import ScanProblem

NAME = "cpu"


@constant_while_tracing
def _absent() -> str | None:
    return absent()


def refuse(p: ScanProblem) -> str | None:
    """Say why the core cannot serve a problem (a phrase), None if it can."""
    if p.q.device.type != "cpu":
        return f"it runs on the CPU, the tensors are on {p.q.device.type!r}"
    if p.q.dtype != torch.float32:
        return f"it sums in float32, this call sums in {str(p.q.dtype).removeprefix('torch.')}"
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return "its operators are not written for vmap and the other transforms of torch.func"
        if forward_ad._current_level >= 0:
            return "it has no derivative in forward mode"
    return _absent()


def chosen(p: ScanProblem, chunk: int | None) -> bool:
    """Whether "auto" takes the core: wherever it can run, unless chunks of a length of their own are asked for."""
    return chunk is None and refuse(p) is None


def run(p: ScanProblem, *, state: bool, last: bool) -> tuple[Tensor, Tensor]:
    """Compute outputs and final state; `state`: not all zeros, `last`: the final state is wanted.

    Raises:
        UnsupportedError: where the core cannot run.
    """
    why = refuse(p)
    if why is not None:
        raise UnsupportedError(f"backend 'cpu' of scan: {why}.")
    if 0 in (*p.q.shape, p.v.shape[3]):
        return chunk_form.run(p, chunk_of(p.decay))
    call = Scan(p.q, p.k, p.v, p.decay, p.state if state else None, p.inclusive)
    out, final = scan_chunks(call, last=last, twice=_twice)
    return out, p.state if final is None else final


def _twice(
    x: Scan, wanted: tuple[bool, ...], grad: Tensor | None, grad_last: Tensor | None
) -> list[Tensor | None]:
    """The gradients through the chunk form of torch operators, which can be differentiated again."""
    with torch.enable_grad():
        # Views: one tensor may stand in several places, and each has a gradient of its own.
        q, k, v = (t.view_as(t) for t in x[:3])
        decay, state = (t if t is None else t.view_as(t) for t in x[3:5])
        own = q, k, v, decay, state
        if state is None:
            state = v.new_zeros((*q.shape[:2], q.shape[3], v.shape[3]))
        results = chunk_form.run(ScanProblem(q, k, v, decay, state, None, x.inclusive), chunk_of(decay))
        pairs = [(y, g) for y, g in zip(results, (grad, grad_last), strict=True) if g is not None]
        leaves = [t for t, use in zip(own, wanted, strict=True) if t is not None and use]
        outs, grads = [y for y, _ in pairs], [g for _, g in pairs]
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        found = iter(torch.autograd.grad(outs, leaves, grads, **options))
    return [next(found) if use else None for use in wanted]
