"""Every file of figures yields complete records, and the page is put together from them."""

import pytest

from benchmarks.papers import Figure
from benchmarks.papers import __main__ as papers
from foveate.core.registry import list_systems


def test_files_are_named_after_systems():
    assert set(papers.keys()) <= {facts.key for facts in list_systems()}


def test_the_page_keeps_other_sections(tmp_path, monkeypatch):
    made = {"swin": "1 | 2", "van": "3"}

    def fake(name):
        ours = made[name.rsplit(".", 1)[1]]
        figure = Figure(claim="a count", paper="2", ours=ours, how="here")
        return type("module", (), {"figures": staticmethod(lambda: [figure])})

    monkeypatch.setattr(papers, "import_module", fake)
    monkeypatch.setattr(papers, "keys", lambda: sorted(made))
    monkeypatch.setattr(papers, "PAGE", tmp_path / "papers.md")
    papers.main(["swin"])
    papers.main(["van"])
    page = papers.PAGE.read_text()
    assert r"| a count | 2 | 1 \| 2 | here |" in page
    assert "## van" in page
    with pytest.raises(SystemExit):
        papers.main(["nobody"])
