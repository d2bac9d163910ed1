"""explain_linear: numbers equal to counted operations and to what decoding really keeps."""

from contextlib import suppress

import pytest
import torch

from foveate.core.errors import ArgumentError, UnknownNameError, UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import get_system, list_systems
from foveate.cost.linear import explain_linear, scans
from foveate.kernels.flops import count_flops
from foveate.mechanisms.baseline.full_attention import FullAttention
from foveate.mechanisms.past import past_bytes
from foveate.models.backbone import build_mixer

CAUSAL = ("lightning_attention", "lightning_attention_2", "transnormer_llm")
DIM, HEADS = 64, 4
each = pytest.mark.parametrize("key", CAUSAL)


def cost(key, n=256, **options):
    return explain_linear(key, dim=DIM, grid=Grid(n), heads=HEADS, **options)


def run(key, n, dtype=torch.float32):
    module = build_mixer(key, dim=DIM, grid=Grid(n), heads=HEADS, causal=True).to(dtype)
    return module, torch.randn(1, n, DIM, dtype=dtype)


def causal_flops(n):
    """A layer of full attention as it is counted, which is with all pairs, less the pairs no kernel needs."""
    counted = count_flops(FullAttention(dim=DIM, heads=HEADS, causal=True), torch.randn(1, n, DIM), Grid(n))
    return counted - 4 * DIM * (n * n - n * (n + 1) // 2)


@each
@pytest.mark.parametrize("n", [64, 100, 256])
def test_operations_are_those_counted_when_it_really_runs(key, n):
    module, x = run(key, n)
    with torch.no_grad():
        counted = count_flops(module, x, Grid(n))
    found = cost(key, n)
    assert found.flops == counted
    maps = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    projections = sum(2 * m.weight.numel() for m in maps)
    assert found.flops - found.scan_flops == n * projections
    assert found.step_flops == projections + sum(4 * c.heads * c.dk * c.dv for c in found.calls)


@each
def test_operations_per_token_do_not_depend_on_the_length(key):
    assert cost(key, 256).flops_per_token == cost(key, 4096).flops_per_token


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_state_is_what_decoding_keeps(key, dtype):
    module, x = run(key, 32, dtype)
    _, past = module.prefill(x)
    found = cost(key, dtype=dtype)
    assert found.state_bytes == past_bytes(past)
    dense = FullAttention(dim=DIM, heads=HEADS, causal=True).to(dtype)
    length = found.cache_crossover
    assert found.cache_bytes(32) == past_bytes(dense.prefill(x)[1])
    assert found.cache_bytes(length) > found.state_bytes >= found.cache_bytes(length - 1)


@each
def test_full_attention_takes_more_from_the_crossover_on(key):
    found = cost(key)
    n = found.crossover
    assert found.dense_flops(100) == causal_flops(100)
    assert causal_flops(n) > found.flops_per_token * n
    assert causal_flops(n - 1) <= found.flops_per_token * (n - 1)
    mixing = found.scan_flops / found.n
    assert 2 * DIM * (found.scan_crossover + 1) > mixing >= 2 * DIM * found.scan_crossover
    # As counted, in whole chunks around it.
    below, above = (n - 1) // 64 * 64, -(-n // 64) * 64 + 64
    module, _ = run(key, above)
    with torch.no_grad():
        ours = {m: count_flops(module, torch.randn(1, m, DIM), Grid(m)) for m in (below, above) if m}
    assert causal_flops(above) > ours[above]
    assert not below or causal_flops(below) <= ours[below]


def test_doubled_features_double_the_state_but_only_in_the_first_layer():
    first, second = cost("transnormer_llm"), cost("lightning_attention_2")
    assert first.state_bytes == 2 * second.state_bytes == 2 * DIM * DIM // HEADS * 4


def test_two_sided_systems_have_no_state_and_are_compared_with_all_pairs():
    keys = [f.key for f in list_systems() if scans(f.key) and f.causal == "no"]
    found = []
    for key in keys:
        # Selective state spaces have no price in products of matrices.
        with suppress(UnsupportedError):
            found.append(explain_linear(key, dim=DIM, grid=Grid(16, 16), heads=HEADS))
    assert found
    for one in found:
        n = one.crossover
        assert not one.causal
        assert "state" not in str(one)
        assert one.dense_flops(n) > one.flops_per_token * n
        assert n == 1 or one.dense_flops(n - 1) <= one.flops_per_token * (n - 1)


def test_a_causal_system_beside_two_sided_attention_pays_earlier():
    found = cost("lightning_attention")
    assert found.crossover_against(causal=True) == found.crossover
    n = found.crossover_against(causal=False)
    two_sided = FullAttention(dim=DIM, heads=HEADS)
    per_token = found.flops_per_token
    assert count_flops(two_sided, torch.randn(1, n, DIM), Grid(n)) > per_token * n
    assert count_flops(two_sided, torch.randn(1, n - 1, DIM), Grid(n - 1)) <= per_token * (n - 1)


def test_the_direction_can_be_asked_for():
    assert cost("lightning_attention", causal=True) == cost("lightning_attention")
    with pytest.raises((ArgumentError, UnsupportedError), match="causal"):
        explain_linear("rala", dim=DIM, grid=Grid(8, 8), heads=HEADS, causal=True)


def test_it_is_readable_and_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    text = str(explain_linear("lightning_attention", dim=512, grid=Grid(4096), heads=8))
    assert torch.equal(torch.rand(2), expected)
    assert "131 kB a sample, at every length" in text
    assert "full attention takes more FLOPs from 384 tokens on; from 256 on without projections" in text


def test_what_does_not_scan_is_refused_with_those_that_do():
    with pytest.raises(
        ArgumentError, match=r"mechanism: expected a system that scans, .*lightning_attention"
    ):
        cost("swin")
    with pytest.raises(UnknownNameError, match="lightning_attention"):
        cost("lightning_attentio")
    with pytest.raises(ArgumentError, match="dim"):
        explain_linear("lightning_attention", dim=10, grid=Grid(8), heads=4)
    assert scans("lightning_attention")
    assert not scans("full_attention")
    assert get_system("lightning_attention").primitive == "scan"
