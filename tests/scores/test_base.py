import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.scores.base import as_scores
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.pairs import Pairs
from foveate.scores.temperature import RowFactor, SoftCap


def test_plus_applies_from_left_to_right():
    x, at = torch.randn(1, 1, 2, 2), Pairs.full(2, 2)
    half, one = RowFactor(torch.tensor([0.5])), Bias(torch.tensor(1.0))
    assert torch.equal((half + one).apply(x, at), x * 0.5 + 1)
    assert torch.equal((one + half).apply(x, at), (x + 1) * 0.5)


def test_sequences_and_sums_flatten_in_order():
    a, b, c = SoftCap(1.0), SoftCap(2.0), SoftCap(3.0)
    assert as_scores([a + b, c]) == as_scores(a + (b + c)) == (a, b, c)
    assert as_scores(None) == ()


def test_chain_shows_its_tensors_and_parts():
    chain = KeyBias(torch.zeros(3)) + SoftCap(2.0)
    assert list(chain.tensors()) == ["0.b"]
    assert repr(chain) == "KeyBias(b=Tensor(3,)) + SoftCap(cap=2.0)"


def test_what_is_no_score_is_refused_with_a_hint():
    with pytest.raises(ArgumentError, match=r"^score: .*Wrap a tensor in Bias"):
        as_scores(torch.zeros(2))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"^score: "):
        as_scores("alibi")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        SoftCap(1.0) + 1  # type: ignore[operator]
