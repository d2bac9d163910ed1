import pytest
import torch

from foveate.advise.admit import Examiner, Site, admit
from foveate.core.grid import Grid
from foveate.core.registry import get_system, list_systems
from foveate.measure.schema import validate
from foveate.measure.store import Store
from tests.advise.tiny import TOYS

SITE = Site(dim=8, heads=2, grid=Grid(6, 6))
CAUSAL = Site(dim=8, heads=2, grid=Grid(32), causal=True)


def row(key, site=SITE):
    found = admit("shapes", TOYS[key], site, examiner=Examiner())
    if found.row is not None:
        store = Store(None, fingerprint={}, settings={})
        store.put(found.row)
        assert validate(store.document) == []
    return found


def test_a_sound_mechanism_is_admitted_with_its_picture():
    found = row("toy_good")
    assert found.row is None
    assert found.facts_row["gate"]["ok"]
    assert found.facts_row["reach"]["grid"] == [6, 6]
    assert len(found.facts_row["reach"]["levels"]) == 36
    assert found.facts_row["family"] == "local"


def test_the_mechanisms_own_reason_is_handed_on():
    found = row("toy_refuses")
    assert found.row["status"] == "refused"
    assert "three axes" in found.row["reason"]
    assert "Error" not in found.row["reason"]


def test_a_red_gate_is_a_failed_row_without_figures():
    found = row("toy_wrong")
    assert found.row["status"] == "failed"
    assert found.row["reason"].startswith("correctness gate is red: output error")
    assert found.row["gate"]["ok"] is False
    assert found.row["forward_ms"] is None


def test_a_system_without_for_workload_is_refused():
    class Bare(torch.nn.Module):
        pass

    from tests.advise.tiny import toy_facts

    found = admit("shapes", toy_facts("bare", Bare, role="kernel"), SITE, examiner=Examiner())
    assert found.row["status"] == "refused"
    assert "for_workload" in found.row["reason"]
    lifts = toy_facts("bare", Bare, role="module", layout="cross", limits="It needs camera views.")
    found = admit("shapes", lifts, SITE, examiner=Examiner())
    assert found.row["status"] == "refused"
    assert found.row["reason"].endswith("It needs camera views.")


def test_causal_workloads_take_causal_mechanisms_only():
    assert row("toy_good", CAUSAL).row is None
    refused = row("toy_not_causal", CAUSAL).row
    assert (refused["status"], refused["reason"]) == ("refused", "not causal: its windows hold later tokens")
    cheat = row("toy_cheats", CAUSAL).row
    assert cheat["status"] == "refused"
    assert cheat["reason"].startswith("not causal: changing the tokens from")


def test_an_exception_while_building_is_a_failure():
    from tests.advise.tiny import Good, toy_facts

    class Crashes(Good):
        @classmethod
        def for_workload(cls, **_):
            raise ZeroDivisionError("oops")

    found = admit("shapes", toy_facts("crash", Crashes), SITE, examiner=Examiner())
    assert found.row["status"] == "failed"
    assert "ZeroDivisionError: oops" in found.row["reason"]


def test_full_attention_is_exact_to_itself():
    facts = get_system("full_attention")
    found = admit("shapes", facts, SITE, examiner=Examiner(facts))
    assert found.row is None
    assert found.facts_row["exactness_error"] == 0.0


def test_examinations_are_made_once_for_all_workloads(monkeypatch):
    from foveate.advise import admit as module

    calls = []
    real = module.check_mechanism
    monkeypatch.setattr(module, "check_mechanism", lambda *a, **k: calls.append(1) or real(*a, **k))
    examiner = Examiner()
    for workload, dim in (("image", 32), ("shapes", 128)):
        site = Site(dim=dim, heads=2, grid=Grid(20, 20))
        assert admit(workload, TOYS["toy_good"], site, examiner=examiner).row is None
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "key", [facts.key for facts in list_systems() if facts.cls.__module__.startswith("foveate.")]
)
def test_every_system_takes_part_or_says_why_not(key, causal):
    site = Site(dim=64, heads=2, grid=Grid(256) if causal else Grid(32, 32), causal=causal)
    found = admit("shapes", get_system(key), site, examiner=Examiner(get_system("full_attention")))
    assert found.row is None or found.row["status"] == "refused", found.row["reason"]
