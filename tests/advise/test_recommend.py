import copy

import pytest

from foveate.advise.recommend import code_to_paste, recommend
from foveate.core.registry import get_system, list_systems
from tests.advise.documents import sample_document


def rows(document, workload):
    return {r["mechanism"]: r for r in document["rows"] if r["workload"] == workload}


def test_resolved_quality_decides_and_speed_breaks_ties():
    document = sample_document()
    first = recommend(document)[0]
    assert (first["workload"], first["basis"]) == ("image", "quality")
    # The best quality is 0.861; 0.853 is within the noise but slower at the user's sizes.
    assert first["mechanism"] == "fused_neighborhood_attention"
    said = " ".join(first["reasons"])
    assert "does not separate it from `dilated_neighborhood`" in said
    assert "x faster than full attention" in said
    assert "Peak memory 96 MiB against 310 MiB" in said
    assert [p["mechanism"] for p in first["ranked"]][:2] == [first["mechanism"], "dilated_neighborhood"]
    assert "Not resolved in this budget: `lightning_attention_2`" in " ".join(first["caveats"])


def test_a_faster_one_within_the_noise_wins():
    document = sample_document()
    shapes = rows(document, "shapes")
    for name in ("forward_ms", "backward_ms", "step_ms"):
        shapes["dilated_neighborhood"][name] /= 5
    assert recommend(document)[0]["mechanism"] == "dilated_neighborhood"


def test_without_resolved_quality_speed_decides_and_it_says_so():
    document = sample_document()
    for row in rows(document, "image").values():
        row["resolved"] = False
        row["rank"] = None
    found = {r["workload"]: r for r in recommend(document)}
    assert found["image"]["basis"] == "speed"
    assert found["image"]["mechanism"] == "lightning_attention_2"
    assert "not resolved in this budget" in found["image"]["caveats"][0]


def test_shapes_alone_recommends_the_fastest_and_warns():
    document = sample_document(("shapes",))
    (only,) = recommend(document)
    assert only["mechanism"] == "lightning_attention_2"
    assert "Speed alone does not say" in only["caveats"][-1]
    assert any("stays closest to its output" in reason for reason in only["reasons"])


def test_equal_times_are_decided_by_memory():
    document = sample_document(("shapes",))
    shapes = rows(document, "shapes")
    shapes["swin"] |= {k: shapes["lightning_attention_2"][k] for k in ("forward_ms", "backward_ms")}
    shapes["swin"]["step_ms"] = shapes["lightning_attention_2"]["step_ms"]
    shapes["swin"]["memory_bytes"] = 1 << 20
    (only,) = recommend(document)
    assert only["mechanism"] == "swin"
    assert any("cannot be told apart in time" in reason for reason in only["reasons"])


def test_reconstructions_are_never_recommended():
    document = sample_document(("shapes",))
    rows(document, "shapes")["lightning_attention_2"]["fidelity"] = "reconstruction"
    assert recommend(document)[0]["mechanism"] == "swin"


def test_full_attention_may_win():
    document = sample_document(("shapes",))
    for row in rows(document, "shapes").values():
        if row["status"] == "measured" and row["mechanism"] != "full_attention":
            row["step_ms"] *= 100
    (only,) = recommend(document)
    assert only["mechanism"] == "full_attention"
    assert only["headline"].startswith("Keep full attention")


def test_lower_is_better_where_the_workload_says_so():
    document = sample_document()
    document["workloads"]["image"] |= {"higher_is_better": False, "floor": 0.9}
    for row in rows(document, "image").values():
        row |= {"resolved": True, "tied_with": [], "rank": None, "steps": 100} if row["quality"] else {}
    assert recommend(document)[0]["mechanism"] == "lightning_attention_2"


def test_no_rows_no_recommendation():
    document = copy.deepcopy(sample_document())
    document["rows"] = [r for r in document["rows"] if r["status"] != "measured"]
    assert recommend(document) == []


@pytest.mark.parametrize("key", [facts.key for facts in list_systems() if hasattr(facts.cls, "for_workload")])
def test_the_code_to_paste_runs(key):
    grid = [16, 16] if 2 in get_system(key).dims else [64]
    site = {"grid": grid, "dim": 32, "heads": 2}
    names = {}
    exec(code_to_paste(key, site), names)
    assert names["y"].shape == names["x"].shape
    assert names["y"].isfinite().all()


def test_code_for_causal_sequences_runs():
    names = {}
    exec(code_to_paste("full_attention", {"grid": [64], "dim": 32, "heads": 2, "causal": True}), names)
    assert names["y"].shape == (2, 64, 32)


def test_a_size_that_was_not_reached_is_said():
    document = sample_document()
    document["workloads"]["shapes"]["measured_grid"] = [40, 40]
    for found in recommend(document):
        assert "The time budget ended at 40×40; 64×64 itself was not timed." in found["caveats"]
        assert any("at 40×40" in reason for reason in found["reasons"])
    assert not any("itself was not timed" in c for r in recommend(sample_document()) for c in r["caveats"])
