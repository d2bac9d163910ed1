"""watch_scans: every call, with the shapes, the form that ran, and prices equal to counted operations."""

import pytest
import torch

from foveate.kernels.flops import count_flops
from foveate.kernels.scan import scan, scan_step
from foveate.kernels.scan.watch import watch_scans


def draw(n, b=2, h=4, hkv=2, dk=8, dv=6):
    return torch.randn(b, h, n, dk), torch.randn(b, hkv, n, dk), torch.randn(b, hkv, n, dv)


def test_calls_are_seen_in_order_and_only_inside():
    q, k, v = draw(20)
    scan(q, k, v)
    with watch_scans() as seen:
        scan(q, k, v, chunk=8)
        with watch_scans() as inner:
            scan(q.bfloat16(), k.bfloat16(), v.bfloat16(), decay=-torch.rand(4), backend="reference")
        scan_step(q[:, :, 0], k[:, :, 0], v[:, :, 0])
    scan(q, k, v)
    assert [(c.n, c.backend, c.decay) for c in seen] == [
        (20, "chunk", "none"),
        (20, "reference", "head"),
        (1, "recurrent", "none"),
    ]
    assert inner == seen[1:2]
    first = seen[0]
    assert (first.batch, first.heads, first.dk, first.dv, first.chunk, first.itemsize) == (2, 4, 8, 6, 8, 4)
    assert inner[0].itemsize == 2


@pytest.mark.parametrize("causal", [True, False, "reverse"])
@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
def test_operations_are_those_counted(kind, causal):
    q, k, v = draw(40, hkv=4)
    decays = {
        "none": None,
        "head": -torch.rand(4),
        "token": -torch.rand(2, 4, 40),
        "channel": -torch.rand(2, 4, 40, 8),
    }
    with watch_scans() as seen:
        counted = count_flops(scan, q, k, v, decay=decays[kind], causal=causal, chunk=16)
    (call,) = seen
    assert call.decay == kind
    assert call.flops == counted


def test_states_are_those_handed_on_and_two_sided_scans_have_none():
    q, k, v = draw(12)
    with watch_scans() as seen:
        _, state = scan(q, k, v, return_state=True)
        scan(q, k, v, causal=False)
    assert seen[0].state_bytes == state.nbytes
    assert seen[1].state_bytes == 0
    # A pair added to the state and a query on it: two multiply-adds per entry of the state.
    assert seen[0].step_flops == 4 * state.numel()
