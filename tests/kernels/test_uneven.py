"""Groups of different sizes: the same as repeating keys and values, without repeating them."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.kernels.attend import attend
from foveate.kernels.select import watch_plans
from foveate.kernels.uneven import attend_uneven
from foveate.patterns.basic import Causal


def qkv(heads=8, groups=4, n=9, d=4):
    return [torch.randn(2, h, n, d, dtype=torch.float64, requires_grad=True) for h in (heads, groups, groups)]


SIZES = [(2, 2, 2, 2), (1, 3, 1, 3), (0, 5, 2, 1), (0, 0, 8, 0), (8, 0, 0, 0)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("where", [None, Causal()], ids=repr)
def test_equals_repeated_keys_and_values(sizes, where):
    q, k, v = qkv()
    at = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    expected = attend(q, k[:, at], v[:, at], where=where)
    for given in (sizes, torch.tensor(sizes)):
        out = attend_uneven(q, k, v, given, where=where)
        torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected))
    torch.testing.assert_close(got, wanted)
    assert all(got[1][:, g].eq(0).all() for g in range(4) if sizes[g] == 0)


@pytest.mark.parametrize("sizes", SIZES)
def test_one_call_per_size_and_no_head_twice(sizes):
    q, k, v = qkv()
    with watch_plans() as plans:
        attend_uneven(q, k, v, sizes)
    assert len(plans) == len(set(sizes) - {0})
    assert sum(plan.kv_heads for plan in plans) == sum(size > 0 for size in sizes)
    assert sum(plan.pairs_needed for plan in plans) == 2 * 8 * 9 * 9


def test_compiled_code_repeats_instead():
    q, k, v = qkv()
    sizes = torch.tensor((0, 5, 2, 1))
    compiled = torch.compile(attend_uneven, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v, sizes), attend_uneven(q, k, v, sizes))


@pytest.mark.parametrize("sizes", [(2, 2, 4), (2, 2, 2, 1), (9, -1, 0, 0)])
def test_sizes_that_do_not_fit_are_named(sizes):
    with pytest.raises(ArgumentError, match="sizes"):
        attend_uneven(*qkv(), sizes)
