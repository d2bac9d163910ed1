"""Pictures show the mask, and the keys of a query on its grid."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from hypothesis import given

from foveate.core.errors import ArgumentError, MissingExtraError
from foveate.patterns import Causal, Full, Neighborhood, SlidingWindow, Windows, with_specials
from tests.patterns.strategies import grid_patterns


def painted(svg):
    """Read the picture back from the SVG's runs."""
    root = ET.fromstring(svg)
    _, _, columns, rows = map(int, root.get("viewBox").split())
    out = torch.zeros(rows, columns, dtype=torch.long)
    for value, path in enumerate(root.findall("{http://www.w3.org/2000/svg}path"), start=1):
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path.get("d")):
            out[int(y), int(x) : int(x) + int(width)] = value
    return out


@given(grid_patterns(borders=("mask", "clamp", "zero")))
def test_svg_is_the_mask(pattern):
    assert torch.equal(painted(pattern.draw_svg()).bool(), pattern.dense())


def test_svg_of_a_query_on_its_grid():
    pattern = Neighborhood((7, 9), 3)
    query = 3 * 9 + 4
    picture = painted(pattern.draw_svg(query=query))
    assert picture.shape == (7, 9)
    assert picture[3, 4] == 2
    assert torch.equal(picture.bool().flatten(), pattern.dense()[query])
    composed = painted((Causal() & pattern).draw_svg(query=query))
    assert composed.shape == (7, 9)


def test_svg_of_a_query_elsewhere():
    assert painted(Neighborhood((2, 3, 4), 2).draw_svg(query=5)).shape == (3, 2 * 4 + 1)
    assert painted(SlidingWindow(2).draw_svg(6, query=3)).tolist() == [[0, 1, 1, 2, 0, 0]]
    assert painted(with_specials(Neighborhood((2, 2), 2), 1).draw_svg(query=0)).shape == (1, 5)


def test_svg_titles_and_size():
    root = ET.fromstring((~Causal() & Windows(8, 4)).draw_svg(8, size=50))
    assert float(root.get("width")) == 50
    assert "Causal" in root.find("{http://www.w3.org/2000/svg}title").text


def test_many_tokens_are_sampled():
    picture = painted(Causal().draw_svg(100_000))
    assert max(picture.shape) <= 128
    assert torch.equal(picture.bool(), Causal().dense(len(picture)))


def test_matplotlib_shows_the_same():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    pattern = Neighborhood((5, 5), 3)
    axes = pattern.draw()
    assert torch.equal(torch.tensor(axes.images[0].get_array().tolist()).bool(), pattern.dense())
    _, mine = pyplot.subplots()
    assert pattern.draw(ax=mine, query=12) is mine
    assert len(mine.images[0].get_array()) == 5
    pyplot.close("all")


def test_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'foveate\[compare\]'"):
        Causal().draw(4)


def test_errors():
    with pytest.raises(ArgumentError, match="n_q"):
        Full().draw_svg()
    for query in (-1, 9, True, 1.0):
        with pytest.raises(ArgumentError, match="query"):
            Full().draw_svg(9, query=query)


def test_svg_needs_no_matplotlib():
    code = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['numpy.random'] = None\n"
        "from foveate.patterns import Causal; assert Causal().draw_svg(4).startswith('<svg')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
