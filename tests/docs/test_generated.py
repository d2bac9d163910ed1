"""Generated documentation is what its generator makes today."""

import pytest

from docs import catalogue, gallery, generate, support
from docs.files import ROOT, with_region
from docs.snippets import blocks, refreshed, run, shown_output
from foveate.core.registry import get_system


@pytest.mark.parametrize("part", generate.CHEAP)
def test_nothing_is_stale(part, capsys):
    assert generate.main([part, "--check"]) == 0, capsys.readouterr().out


def test_every_generated_file_exists():
    for key in (facts.key for facts in catalogue.systems() if catalogue.has_picture(facts)):
        assert (ROOT / "docs" / "img" / "systems" / f"{key}.svg").exists(), "run python -m docs.generate"
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert [f"[`{f.key}`](catalogue.md#{f.key})" in page for f in catalogue.systems()] == [True] * len(
        catalogue.systems()
    )


def test_the_check_names_what_is_stale(tmp_path, monkeypatch, capsys):
    path = ROOT / "docs" / "img" / "not-there.svg"
    monkeypatch.setitem(generate.PARTS, "gallery", lambda: {path: "x"})
    assert generate.main(["gallery", "--check"]) == 1
    assert "stale docs/img/not-there.svg" in capsys.readouterr().out
    assert not path.exists()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        generate.main(["galery"])
    assert "no part 'galery'" in capsys.readouterr().err


def test_captions_are_the_code_that_draws():
    for tile in gallery.TILES:
        length = tile.pattern.tokens or gallery.LENGTH
        assert tile.pattern.dense(length).any()
    assert gallery.gallery({"title": "#000", "code": "#000"}).count("<svg") == 1 + len(gallery.TILES)


def test_regions_are_replaced_once():
    page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb"
    assert with_region(page, "x", "new") == "a\n<!-- begin: x -->\nnew\n<!-- end: x -->\nb"
    with pytest.raises(ValueError, match="exactly one region"):
        with_region(page, "y", "new")


PAGE = "```python\nx = 2\n```\n\n```python\nprint(x + 1)\n```\n\n```text\nold\n```\n\n```text\nfree\n```\n"


def test_snippets_share_a_namespace_and_their_output_is_refreshed():
    assert [printed for _, _, printed in run(PAGE, "page")] == ["", "3\n"]
    assert refreshed(PAGE, "page") == PAGE.replace("old", "3")
    found = blocks(PAGE)
    assert [shown_output(PAGE, found, i) for i in (0, 1)] == [None, found[2]]


def test_the_support_matrix_tells_refusals_from_failures():
    cells = dict(zip(support.HEAD, support.row(get_system("full_attention")), strict=True))
    assert cells["2-d"] == cells["float64"] == cells["causal"] == "yes"
    assert support._tried(lambda: 1 / 0) == "fails (ZeroDivisionError)"
    assert support._tried(lambda: False) == "wrong"
    assert support._tried(support._causal, get_system("swin")) == "no"
