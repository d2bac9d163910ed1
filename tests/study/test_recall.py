"""The study as a whole: figures against plain ones, records, pictures, sources."""

import json

import pytest
import torch
from safetensors.torch import save_file as save_tensors

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, Full, SlidingWindow
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection
from foveate.study import recall as module
from foveate.study.maps import Maps, load_maps, random_maps
from foveate.study.plot import save
from foveate.study.recall import recall
from foveate.study.records import Recall, Reference, Row
from foveate.study.table import sentences

N = 64


def save_file(tensors, path, metadata=None):
    """Save copies: the format refuses tensors that share memory."""
    save_tensors({name: x.clone() for name, x in tensors.items()}, path, metadata)


def layer(name="", n=N):
    q, k, v = (torch.randn(2, 4, n, 8) for _ in range(3))
    return Maps(name, q, k[:, :2], v[:, :2])


def plain(maps, where, causal):
    """Figures of a pattern from N x N tensors."""
    maps = maps.spread()
    mask = (where & Causal() if causal else where).dense(N)
    logits = maps.q @ maps.k.transpose(-1, -2) * 8**-0.5
    if causal:
        logits = logits.masked_fill(~Causal().dense(N), float("-inf"))
    p = logits.softmax(-1)
    mass = (p * mask).sum(-1)
    full, part = p @ maps.v, ((p * mask) @ maps.v) / mass[..., None]
    error = ((part - full).square().sum((-1, -2)) / full.square().sum((-1, -2))).sqrt()
    best = torch.stack(
        [p[..., i, :].sort(descending=True).values[..., : int(mask[i].sum())].sum(-1) for i in range(N)]
    )
    return {"mass": mass.mean(), "error": error.mean(), "oracle": best.mean(), "pairs": mask.float().mean(),
            "mass_worst_decile": mass.transpose(0, 1).flatten(1).quantile(0.1, dim=1).mean()}  # fmt: skip


@pytest.mark.parametrize("kept", [1 << 25, 0])
@pytest.mark.parametrize("causal", [False, True])
def test_figures_are_the_plain_ones(monkeypatch, causal, kept):
    monkeypatch.setattr(module, "_KEPT", kept)
    maps, where = layer(), SlidingWindow(7, 4)
    found = recall(maps, only=["window"], routers={"mine": lambda q, k: where}, causal=causal, queries=N)
    row = next(row for row in found.rows if row.candidate == "mine")
    for name, value in plain(maps, where, causal).items():
        assert getattr(row, name) == pytest.approx(float(value), abs=2e-5), name
    assert len(row.heads["mass"]) == 4
    assert row.computed >= row.pairs


@pytest.mark.parametrize("causal", [False, True])
def test_all_pairs_capture_everything_and_err_nowhere(causal):
    found = recall(layer(), only=["window"], routers={"all": lambda q, k: Full()}, causal=causal)
    row = found.rows[-1]
    assert row.mass == pytest.approx(1, abs=1e-5)
    assert row.error < 1e-5
    assert row.oracle == pytest.approx(1, abs=1e-5)
    assert row.pairs == pytest.approx((N + 1) / (2 * N) if causal else 1)


def test_nothing_captures_more_than_the_best_pairs():
    found = recall(layer(), grid=(8, 8))
    assert set(found.refused) == {"tree search", "stripes", "spans"}
    assert len({row.family for row in found.rows}) >= 10
    for row in found.rows:
        assert row.mass <= row.oracle + 1e-5, row.candidate
        assert row.random == pytest.approx(row.pairs, abs=1e-5)
        assert (row.choosing > 0) == (row.kind == "content")
    line = [x.mass for x in found.references if x.rule == "oracle"]
    assert line == sorted(line)


def test_routers_see_the_scale_of_the_logits():
    maps = layer()
    seen = []
    recall(
        Maps("", maps.q, maps.k, maps.v, 1.0),
        only=["window"],
        routers={"x": lambda q, k: seen.append(q) or Full()},
    )
    torch.testing.assert_close(seen[0], maps.q * 8**0.5)


def test_some_queries_tell_about_all():
    maps = random_maps(512, head_dim=16)
    whole = recall(maps, only=["window"], budgets=(0.2,), queries=512).rows[0]
    some = recall(maps, only=["window"], budgets=(0.2,), queries=64)
    assert some.settings["queries"] == 64
    assert some.rows[0].mass == pytest.approx(whole.mass, abs=0.02)
    assert some.rows[0].computed == whole.computed


def test_cells_that_combine_otherwise_are_run_as_they_say():
    ids = torch.tensor([[[[0, 1, 2, 3], [2, 3, 4, 5]]]])
    where = Selection(ids, ids, n_q=N, n_k=N, combine=Mean(0.5))
    maps = layer()
    row = recall(maps, only=["window"], routers={"cells": lambda q, k: where}, queries=N).rows[-1]
    own = maps.spread()
    full = attend(own.q, own.k, own.v)
    error = (attend(own.q, own.k, own.v, where=where) - full).square().sum((-1, -2)) / full.square().sum(
        (-1, -2)
    )
    assert row.error == pytest.approx(float(error.sqrt().mean()), rel=1e-4)


def test_a_router_that_fails_says_why_and_the_others_go_on():
    found = recall(layer(), only=["window"], routers={"no": lambda q, k: None})
    assert "a function that returns a Pattern" in found.refused["no"]
    assert found.rows


def test_layers_have_rows_of_their_own_and_a_mean():
    found = recall([layer("a"), layer("b")], only=["window"], budgets=(0.1, 0.3))
    assert found.layers == ["a", "b"]
    assert len(found.rows) == 4
    whole = found.mean()
    assert len(whole.rows) == 2
    assert whole.rows[0].mass == pytest.approx((found.rows[0].mass + found.rows[2].mass) / 2)
    shares = [x.pairs for x in whole.references if x.rule == "oracle"]
    assert shares == [x.pairs for x in found.references if x.rule == "oracle" and x.layer == "a"]


def test_records_come_back_from_json():
    found = recall(layer(), only=["window"], budgets=(0.1,))
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert Recall.from_dict(document | {"created": "now"}) == found
    with pytest.raises(ArgumentError, match="schema"):
        Recall.from_dict(document | {"schema_version": 99})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queries": 0}, "queries"),
        ({"budgets": [2.0]}, "budgets"),
        ({"grid": (3, 3)}, "grid: expected 9 tokens"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ArgumentError, match=said):
        recall(layer(), **options)


def test_layers_must_be_alike():
    with pytest.raises(ArgumentError, match="equally many tokens"):
        recall([layer("a"), layer("b", 32)])
    with pytest.raises(ArgumentError, match="a name of its own"):
        recall([layer(), layer()])
    with pytest.raises(ArgumentError, match="at least one layer"):
        recall([])


def row(candidate, computed, mass, choosing=0.0):
    names = {"layer": "", "family": candidate, "candidate": candidate, "kind": "static"}
    spent = {"pairs": computed, "computed": computed, "random": computed, "choosing": choosing}
    return Row(**names, **spent, mass=mass, mass_worst_decile=mass, oracle=mass, error=0.1)


def test_the_frontier_and_what_is_said():
    rows = [row("a", 0.1, 0.5), row("b", 0.2, 0.4), row("c", 0.3, 0.95, choosing=2.0)]
    line = [Reference(layer="", rule="oracle", pairs=0.05, mass=0.92, mass_worst_decile=0.9, error=0.1)]
    found = Recall(settings={}, rows=rows, references=line)
    assert found.frontier() == {("", "a"), ("", "c")}
    assert list(found.cheapest(0.9)) == ["c"]
    said = " ".join(sentences(found))
    assert "best 5.0% of the pairs would hold 92.0%" in said
    assert "c (c) captures 95.0% with 30.0%" in said
    assert "Choosing costs more" in said
    assert "Nobody captured 99.0%; the most is 95.0%, by c" in " ".join(sentences(found, 0.99))


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_pictures(tmp_path, ending):
    found = recall(layer(), only=["window", "blocks by mean"])
    path = save(found, tmp_path / "x" / f"r{ending}", "title")
    assert path.stat().st_size > 5000
    if ending == ".svg":
        assert save(found, tmp_path / "again.svg", "title").read_text().count(
            "<path"
        ) == path.read_text().count("<path")
    with pytest.raises(ArgumentError, match="ends with one of"):
        save(found, tmp_path / "r.txt")


def test_files_of_one_layer_and_of_several(tmp_path):
    x = torch.randn(2, 8, 4)
    save_file(
        {"q": x, "k": x, "v": x},
        tmp_path / "one.safetensors",
        {"scale": "0.5", "causal": "true", "grid": "2x4"},
    )
    (maps,), said = load_maps(tmp_path / "one.safetensors")
    assert maps.q.shape == (1, 2, 8, 4)
    assert (maps.name, maps.scale) == ("", 0.5)
    assert said == {"scale": 0.5, "causal": True, "grid": Grid(2, 4)}
    several = {f"layers.{i}.{letter}": x[None] for i in (10, 9) for letter in "qkv"}
    save_file(several, tmp_path / "two.safetensors")
    maps, said = load_maps(tmp_path / "two.safetensors")
    assert [m.name for m in maps] == ["layers.9", "layers.10"]
    assert said == {}


def test_files_that_cannot_be_used_are_named(tmp_path):
    x = torch.randn(2, 8, 4)
    with pytest.raises(ArgumentError, match="file: expected a safetensors file"):
        load_maps(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(ArgumentError, match="Reading it says"):
        load_maps(tmp_path / "text.safetensors")
    save_file({"q": x, "k": x}, tmp_path / "two.safetensors")
    with pytest.raises(ArgumentError, match="expected also 'v'"):
        load_maps(tmp_path / "two.safetensors")
    save_file({"weight": x}, tmp_path / "other.safetensors")
    with pytest.raises(ArgumentError, match="Name them q, k, v"):
        load_maps(tmp_path / "other.safetensors")
    save_file({"q": x, "k": x, "v": x}, tmp_path / "odd.safetensors", {"causal": "perhaps"})
    with pytest.raises(ArgumentError, match="causal is true or false"):
        load_maps(tmp_path / "odd.safetensors")


def test_random_maps_are_the_same_for_the_same_seed():
    assert torch.equal(random_maps(16, seed=3)[0].q, random_maps(16, seed=3)[0].q)
    with pytest.raises(ArgumentError, match="heads"):
        random_maps(16, heads=0)
