"""Every position term has a picture."""

from xml.etree import ElementTree

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.scores.after import Multiply
from foveate.scores.bias import KeyBias
from foveate.scores.buckets import BucketTable, T5Buckets
from foveate.scores.distance import ALiBi, alibi_slopes
from foveate.scores.draw import draw_score, draw_score_svg, score_map
from foveate.scores.relative import RelativeTable
from foveate.scores.rotations import AxialRotary, MultimodalRotary, Rotary
from foveate.scores.skew import RelativeLogits

PARTS = [
    RelativeTable(torch.randn(1, 5), Grid(12), clip=True),
    RelativeTable(torch.randn(2, 3, 5), Grid(3, 4), "query-key"),
    RelativeLogits(torch.randn(1, 2, 12, 7), -6),
    BucketTable(torch.randn(2, 32), T5Buckets()),
    ALiBi(alibi_slopes(2)) + KeyBias(torch.randn(12)),
    Multiply(BucketTable(torch.randn(2, 32), T5Buckets())),
    Rotary(),
    AxialRotary(Grid(3, 4)),
    MultimodalRotary((2, 1, 1)),
]


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
def test_every_term_draws(part):
    picture = draw_score_svg(part, 12, heads=2, head=1)
    root = ElementTree.fromstring(picture)
    assert root.find("{*}title").text == repr(part)
    assert len(root.findall("{*}path")) >= 12
    axes = draw_score(part, 12, heads=2)
    assert axes.get_ylabel() == "queries"


def test_the_map_is_what_is_added_or_multiplied():
    table = torch.randn(2, 23)
    found = score_map(RelativeTable(table, Grid(12)), 12, head=1, heads=2)
    assert found[3, 8] == table[1, 11 + 5]
    factor = score_map(Multiply(RelativeTable(table, Grid(12))), 12, head=1, heads=2)
    assert torch.equal(factor, found)
    turned = score_map(Rotary(), 12)
    torch.testing.assert_close(turned.diagonal(), torch.ones(12))
    torch.testing.assert_close(turned[0, 5], turned[5, 10])


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ArgumentError, match=r"^part:"):
        score_map(torch.zeros(3), 4)
