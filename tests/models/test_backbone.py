"""One network for every mechanism."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import conv1d, one_hot, pad

from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.core.grid import Grid
from foveate.models.backbone import Backbone, NetSpec, build, sine_positions
from tests.tasks.stand_ins import Dense, Mean, Nothing

PIXELS = NetSpec(
    inputs="pixels", grid=Grid(4, 3), in_features=2, out_features=5, patch=2, overlap=1, dim=8, heads=2
)
IDS = NetSpec(inputs="ids", grid=Grid(7), in_features=11, out_features=3, dim=8, heads=2, causal=True)


def test_shapes_of_pixels_and_ids():
    assert Backbone(PIXELS, Dense)(torch.randn(2, 2, 8, 6)).shape == (2, 12, 5)
    assert Backbone(IDS, Dense)(torch.randint(11, (2, 7))).shape == (2, 7, 3)


@pytest.mark.parametrize(("sizes", "shape"), [((5,), (10,)), ((2, 3, 4), (4, 6, 8))])
def test_pixels_in_one_and_three_dimensions(sizes, shape):
    spec = NetSpec(
        inputs="pixels", grid=Grid(*sizes), in_features=1, out_features=2, patch=2, dim=12, heads=2
    )
    assert Backbone(spec, Mean)(torch.randn(1, 1, *shape)).shape == (1, Grid(*sizes).numel, 2)


def test_everything_but_the_mixers_starts_the_same():
    ours, theirs = (
        {k: v for k, v in Backbone(PIXELS, mixer, seed=3).state_dict().items() if "mixer." not in k}
        for mixer in (Dense, Mean)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_seeds_fix_everything_and_differ():
    one, same, other = (Backbone(PIXELS, Dense, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])
    assert not torch.equal(one["blocks.0.mixer.qkv.weight"], one["blocks.1.mixer.qkv.weight"])


def test_building_leaves_the_users_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    Backbone(PIXELS, Dense, seed=9)
    assert torch.equal(torch.rand(3), expected)


def test_counts_tell_mixers_from_the_rest():
    dense, nothing = (Backbone(IDS, mixer).parameter_counts() for mixer in (Dense, Nothing))
    assert nothing["mixers"] == 0
    assert dense["mixers"] == 2 * (8 * 24 + 24 + 8 * 8 + 8)
    assert dense["total"] - dense["mixers"] == nothing["total"]


def test_a_causal_network_does_not_see_the_future():
    model = Backbone(IDS, Dense)
    ids = torch.randint(11, (1, 7))
    changed = ids.clone()
    changed[:, 4:] = (ids[:, 4:] + 1) % 11
    a, b = model(ids), model(changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.equal(a[:, 4:], b[:, 4:])


def test_embeddings_look_back_as_a_causal_convolution_over_the_tokens():
    wide = Backbone(replace(IDS, before=2), Nothing, seed=1)
    plain = Backbone(IDS, Nothing, seed=1)
    tables = [wide.embed.weight, *(table.weight for table in wide.earlier)]
    assert len(tables) == 3
    rest = {k: v for k, v in wide.state_dict().items() if not k.startswith("earlier.")}
    assert rest.keys() == plain.state_dict().keys()
    assert all(torch.equal(rest[k], v) for k, v in plain.state_dict().items())
    ids = torch.randint(11, (2, 7))
    kernel = torch.stack(tables[::-1], dim=2).transpose(0, 1)  # (C, vocabulary, 3), the earliest token first
    tokens = pad(one_hot(ids, 11).float().mT, (2, 0))
    seen = []
    wide.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    wide(ids)
    torch.testing.assert_close(seen[0], conv1d(tokens, kernel).mT + wide.position)


@pytest.mark.parametrize("grid", [Grid(9), Grid(4, 5), Grid(3, 2, 4)])
def test_positions_are_distinct(grid):
    table = sine_positions(grid, 24)
    assert table.shape == (grid.numel, 24)
    assert torch.cdist(table, table).add(torch.eye(grid.numel) * 9).min() > 1e-3


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"heads": 3}, "dim"),
        ({"depth": 0}, "depth"),
        ({"inputs": "words"}, "inputs"),
        ({"grid": Grid(2, 2)}, "grid"),
        ({"overlap": -1}, "overlap"),
        ({"before": -1}, "before"),
        ({"before": 7}, "before"),
        ({"inputs": "pixels", "before": 1}, "before"),
    ],
)
def test_bad_specs_are_named(change, name):
    options = {"inputs": "ids", "grid": Grid(7), "in_features": 3, "out_features": 3, "dim": 8, "heads": 2}
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        NetSpec(**(options | change))


def test_unknown_mechanisms_are_named():
    with pytest.raises(UnknownNameError, match="no_such_mechanism"):
        build("no_such_mechanism", PIXELS)


@pytest.mark.parametrize("key", ["full_attention", "fused_neighborhood_attention"])
def test_registered_mechanisms_fit_in(key):
    spec = NetSpec(inputs="pixels", grid=Grid(8, 8), in_features=1, out_features=2, dim=16, heads=2)
    assert build(key, spec)(torch.randn(1, 1, 8, 8)).shape == (1, 64, 2)


def test_mixers_that_differ_by_layer_are_told_theirs():
    spec = NetSpec(inputs="pixels", grid=Grid(16, 16), in_features=1, out_features=2, depth=3)
    assert [block.mixer.shift for block in build("swin", spec).blocks] == [(0, 0), (4, 4), (0, 0)]


def test_heads_forget_less_from_layer_to_layer():
    spec = NetSpec(inputs="ids", grid=Grid(8), in_features=3, out_features=2, dim=16, heads=2, depth=3)
    layers = [block.mixer for block in build("transnormer_llm", spec).blocks]
    assert [(m.layer, m.layers, m.theta is None) for m in layers] == [
        (0, 3, False),
        (1, 3, True),
        (2, 3, True),
    ]
    assert layers[0].slopes[0] > layers[1].slopes[0] > layers[2].slopes[0]
