"""draw_token: the distribution, its cuts, determinism, and named errors."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.models.sampling import draw_token

LOGITS = torch.tensor([[1.0, 3.0, 0.0, 2.0]])


def drawn(times=4000, **options):
    """Frequencies of the four tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = draw_token(LOGITS.expand(times, -1), generator=generator, **options)
    return torch.bincount(tokens, minlength=4) / times


def test_tokens_come_as_often_as_the_softmax_says():
    torch.testing.assert_close(drawn(), LOGITS.softmax(-1)[0], rtol=0, atol=0.03)
    torch.testing.assert_close(drawn(temperature=2.0), (LOGITS / 2).softmax(-1)[0], rtol=0, atol=0.03)


def test_temperature_zero_takes_the_most_likely_and_low_ones_nearly_always():
    assert draw_token(LOGITS, temperature=0).tolist() == [1]
    assert drawn(temperature=0.05)[1] == 1
    assert draw_token(torch.zeros(1, 4), temperature=0).tolist() == [0]


def test_top_k_keeps_k_also_among_equals():
    assert (drawn(top_k=2) > 0).tolist() == [False, True, False, True]
    assert drawn(top_k=1)[1] == 1
    torch.testing.assert_close(drawn(top_k=2)[1], LOGITS[0, [1, 3]].softmax(-1)[0], rtol=0, atol=0.03)
    torch.testing.assert_close(drawn(top_k=9), drawn())
    tokens = draw_token(torch.zeros(500, 6), top_k=3)
    assert len(tokens.unique()) == 3


def test_top_p_keeps_the_fewest_that_reach_it():
    # Probabilities 0.644, 0.237, 0.087, 0.032 in order of likelihood.
    assert (drawn(top_p=0.6) > 0).tolist() == [False, True, False, False]
    assert (drawn(top_p=0.7) > 0).tolist() == [False, True, False, True]
    assert (drawn(top_p=0.9) > 0).tolist() == [True, True, False, True]
    assert drawn(top_p=1e-6)[1] == 1
    torch.testing.assert_close(drawn(top_p=1.0), drawn())
    # The cuts are made one after the other: of two tokens the first has 0.73.
    assert (drawn(top_k=2, top_p=0.7) > 0).tolist() == [False, True, False, False]


def test_a_generator_fixes_the_draw_and_the_global_state_stays():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again = (
        draw_token(torch.zeros(50, 20), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, again)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(first, draw_token(torch.zeros(50, 20), generator=torch.Generator().manual_seed(4)))


def test_half_precision_logits():
    assert draw_token(LOGITS.bfloat16(), top_p=0.5).tolist() == [1]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_what_cannot_be_is_named(options, name):
    with pytest.raises(ArgumentError, match=rf"^{name}: expected"):
        draw_token(LOGITS, **options)
    with pytest.raises(ArgumentError, match=r"^logits: expected \(batch, vocabulary\)"):
        draw_token(LOGITS[0])
