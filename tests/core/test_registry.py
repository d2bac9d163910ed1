"""The register: look-ups, filters, errors, and systems from outside the tree."""

import subprocess
import sys
import textwrap

import pytest
from torch import nn

import foveate
from foveate.core import registry
from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.core.registry import Facts, create, get_system, list_systems, system

FACTS = {
    "title": "A Paper",
    "arxiv": "2601.00001",
    "year": 2026,
    "family": "local",
    "role": "gate",
    "cost": "O(N)",
}


@pytest.fixture
def own_register(monkeypatch):
    monkeypatch.setattr(registry, "_SYSTEMS", dict(registry._SYSTEMS) if get_system("swin") else {})


def test_records_are_sorted_and_filtered():
    keys = [facts.key for facts in list_systems()]
    assert keys == sorted(keys)
    assert {"swin", "full_attention"} <= set(keys)
    assert {f.key for f in list_systems("*neighborhood*")} == {
        "fused_neighborhood_attention",
        "generalized_neighborhood",
        "dilated_neighborhood",
    }
    assert all(f.family == "local" for f in list_systems(family="local"))
    assert [f.key for f in list_systems(family="baseline", role="module")] == ["full_attention"]
    assert list_systems(family="no such family") == []
    assert all(f.fidelity == "vectors" for f in list_systems(fidelity="vectors"))


def test_create_builds_with_options():
    module = foveate.create("swin", dim=16, heads=4, window=5)
    assert isinstance(module, nn.Module)
    assert module.window == (5, 5)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("swim", "swin"), ("dilated_neighbourhood", "dilated_neighborhood")],
)
def test_unknown_names_get_the_nearest(typed, meant):
    with pytest.raises(UnknownNameError, match=f"Did you mean.*'{meant}'"):
        create(typed)


def test_unknown_options_are_named_with_the_known_ones():
    with pytest.raises(ArgumentError, match=r"^windows: expected an option of 'swin': dim, heads, window"):
        create("swin", dim=8, heads=2, windows=7)


def test_missing_options_are_named():
    with pytest.raises(ArgumentError, match=r"^options: expected also heads for 'swin'"):
        create("swin", dim=8)


def test_facts_tell_paper_and_docstring():
    facts = get_system("swin")
    assert facts.paper.endswith("(2021, arXiv:2103.14030)")
    assert facts.doc.startswith("Swin Transformer")
    assert Facts(key="x", cls=nn.Module, **FACTS | {"arxiv": ""}).paper == "A Paper (2026)"


def test_a_taken_key_is_refused(own_register):
    with pytest.raises(ArgumentError, match=r"^key: expected a key that is not taken"):
        system(key="swin", **FACTS)(nn.Identity)


def test_an_unknown_fidelity_is_refused(own_register):
    with pytest.raises(ArgumentError, match=r"^fidelity: expected one of"):
        system(key="new_one", fidelity="surely", **FACTS)(nn.Identity)
    assert "new_one" not in registry._SYSTEMS


def test_the_same_class_may_register_again(own_register):
    system(key="new_one", **FACTS)(nn.Identity)
    system(key="new_one", **FACTS)(nn.Identity)
    assert get_system("new_one").cls is nn.Identity


def test_systems_from_outside_the_tree(tmp_path):
    (tmp_path / "their_package.py").write_text(
        textwrap.dedent('''
            """Foo Attention. arXiv 2601.00001, 2026."""
            from torch import nn
            from foveate.core.registry import system

            @system(key="foo_attention", title="Foo Attention", arxiv="2601.00001", year=2026,
                    family="local", role="gate", cost="O(N)")
            class Foo(nn.Module):
                def __init__(self, *, dim):
                    super().__init__()
        ''')
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[foveate.systems]\nfoo = their_package\n")
    code = (
        "import foveate; print([f.paper for f in foveate.list_systems('foo*')],"
        " type(foveate.create('foo_attention', dim=3)).__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\n")[0] == "['Foo Attention (2026, arXiv:2601.00001)'] Foo"
