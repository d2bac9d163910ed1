"""decoding_bytes: what prefill really leaves behind, of all layers, at the network's length."""

import pytest
import torch

from foveate.core.errors import UnsupportedError
from foveate.core.grid import Grid
from foveate.cost.linear import explain_linear
from foveate.cost.state import decoding_bytes
from foveate.models.backbone import Backbone, NetSpec, build

DIM, HEADS = 32, 2


def network(key, n=64, depth=2, causal=True):
    spec = NetSpec(
        inputs="ids",
        grid=Grid(n),
        in_features=5,
        out_features=3,
        dim=DIM,
        heads=HEADS,
        depth=depth,
        causal=causal,
    )
    return build(key, spec)


@pytest.mark.parametrize("n", [32, 128])
def test_keys_and_values_grow_with_the_length_and_the_layers(n):
    for depth in (1, 3):
        assert decoding_bytes(network("full_attention", n, depth)) == depth * 2 * n * DIM * 4


@pytest.mark.parametrize("key", ["lightning_attention", "lightning_attention_2"])
def test_a_state_is_of_one_size_and_the_one_explained(key):
    found = {decoding_bytes(network(key, n)) for n in (32, 64, 256)}
    assert found == {2 * explain_linear(key, dim=DIM, grid=Grid(64), heads=HEADS).state_bytes}


def test_layers_that_differ_are_each_counted():
    # The first of TransNormerLLM's layers has features twice as wide as the others.
    assert decoding_bytes(network("transnormer_llm", depth=3)) == 4 * DIM * DIM // HEADS * 4


def test_it_follows_the_dtype_and_leaves_the_network_alone():
    model = network("full_attention").to(torch.bfloat16).train()
    model.blocks[0].mixer.eval()
    assert decoding_bytes(model) == 2 * 2 * 64 * DIM * 2
    assert model.training
    assert [block.mixer.training for block in model.blocks] == [False, True]
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_decode_has_no_figure():
    assert decoding_bytes(network("full_attention", causal=False)) is None
    assert decoding_bytes(network("sigmoid_attention")) is None

    class Silent(torch.nn.Module):
        def prefill(self, x, past=None):
            raise UnsupportedError("not at this length")

        def step(self, x, past):
            raise AssertionError

    assert decoding_bytes(Backbone(network("full_attention").spec, lambda **_: Silent())) is None
