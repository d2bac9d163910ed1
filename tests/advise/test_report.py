import re
from html.parser import HTMLParser

import pytest

from foveate.advise.plots import pareto
from foveate.advise.reach import reach_file, reach_picture
from foveate.advise.recommend import recommend
from foveate.advise.report import render, write_report
from foveate.advise.table import plain_table
from foveate.measure.schema import validate
from foveate.measure.store import Store
from tests.advise.documents import MECHANISMS, sample_document

VOID = {"meta", "wbr", "link", "br", "img", "input", "circle", "line", "rect", "path", "hr"}


class Checker(HTMLParser):
    """Collects ids and attributes, and complains about tags that do not match."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.names, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[k] for k in ("src", "href", "action", "data") if k in found]
        if tag == "svg" and "aria-hidden" not in found:
            self.names.append(found.get("aria-label"))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return render(sample_document())


def parsed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    return checker


def test_is_well_formed_and_asks_the_network_for_nothing(page):
    found = parsed(page)
    assert len(found.ids) == len(set(found.ids))
    assert found.links == ["#main"]
    assert "default-src 'none'" in page
    assert not re.search(r"@import|url\(", page)


def test_every_picture_has_a_name(page):
    names = parsed(page).names
    assert len(names) > 2 * len(MECHANISMS)
    assert all(names)


def test_shows_what_was_asked_for(page):
    text = " ".join(parsed(page).text)
    for wanted in (
        "fused_neighborhood_attention",
        "Quality against time",
        "Time as the grid grows",
        "Measured beside possible",
        "Peak memory",
        "Whom they listen to",
        "Slower than full attention",
        "from foveate import Grid",
        "not resolved in this budget",
        "correctness gate is red",
        "grid: expected two axes",
        "The machine",
    ):
        assert wanted in text, wanted
    for key in MECHANISMS:
        assert key in text


def test_text_of_mechanisms_cannot_become_markup():
    document = sample_document(("shapes",))
    document["rows"][-1]["reason"] = "<script>alert(1)</script>"
    document["rows"][0]["paper"] = "A & B <b>"
    page = render(document)
    assert "<script>alert" not in page
    assert "A &amp; B &lt;b&gt;" in page
    parsed(page)


def test_partial_and_empty_runs_have_a_page():
    document = sample_document(("image",))
    document["status"] = "interrupted"
    for row in document["rows"]:
        row |= {"forward_ms": None, "backward_ms": None, "step_ms": None, "memory_bytes": None}
    document["recommendations"] = recommend(document)
    assert "partial: interrupted" in render(document)
    empty = Store(None, fingerprint=document["fingerprint"], settings=document["settings"]).document
    assert "Nothing was measured yet" in render(empty)


def test_is_written_to_a_file(tmp_path):
    path = write_report(sample_document(("shapes",)), tmp_path / "a" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert path.stat().st_size < 2_000_000


@pytest.mark.parametrize("sizes", [(7,), (4, 6), (3, 4, 5)])
def test_reach_pictures_of_every_rank(sizes):
    count = 1
    for size in sizes:
        count *= size
    levels = [i % 10 for i in range(count)]
    svg = reach_picture({"grid": list(sizes), "levels": levels}, label="x")
    drawn = sizes[-1] if len(sizes) == 1 else sizes[-1] * sizes[-2]
    assert 0 < svg.count('class="cell"') <= drawn
    assert "<style>" in reach_file({"grid": list(sizes), "levels": levels}, "x")


def test_recall_shows_what_is_kept_against_what_is_remembered():
    document = sample_document(("recall",))
    assert validate(document) == []
    page = render(document)
    text = " ".join(parsed(page).text)
    assert "Quality against what decoding keeps" in text
    assert "Without decoding of their own: fused neighborhood attention." in text
    assert "lightning_attention_2: 0.41 ± 0.01 at 8 KiB kept for decoding" in text
    picture = pareto(
        [r for r in document["rows"] if r["state_bytes"]],
        info=document["workloads"]["recall"],
        best=None,
        against="state",
    )
    assert "accuracy against bytes that decoding keeps of one sample" in picture
    # The axis is logarithmic: equal factors are equal distances.
    at = dict(
        zip(("8 KiB", "32 KiB", "128 KiB"), positions(picture, "8 KiB", "32 KiB", "128 KiB"), strict=True)
    )
    assert at["32 KiB"] - at["8 KiB"] == pytest.approx(at["128 KiB"] - at["32 KiB"], abs=0.2)
    assert picture.count("<circle") == 4


def positions(picture, *ticks):
    return [float(re.search(rf'<text x="([\d.]+)"[^>]*>{tick}</text>', picture).group(1)) for tick in ticks]


def test_without_anything_kept_there_is_no_such_picture():
    document = sample_document(("recall",))
    for row in document["rows"]:
        row["state_bytes"] = None
    assert "what decoding keeps" not in render(document)
    assert "what decoding keeps" not in render(sample_document(("image",)))


def test_crossovers_stand_beside_one_another(page):
    text = " ".join(" ".join(parsed(page).text).split())
    assert "Crossover: predicted and measured." in text
    assert "lightning_attention_2 655 k 64 KiB 129 582" in text
    without = sample_document(("image",))
    assert "Crossover" not in render(without)


def test_terminal_table_says_the_same():
    document = sample_document()
    text = plain_table(document)
    assert "not resolved in this budget" in text
    assert "3.43x" in text
    assert "N^1.03" in text
    for key in MECHANISMS:
        assert key in text
    assert "image:" not in plain_table(document, "shapes")
