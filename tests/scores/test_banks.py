"""A score of one bank of keys, on all keys."""

import pytest
import torch

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import attend
from foveate.patterns.basic import Causal, SlidingWindow
from foveate.scores.banks import on_keys
from foveate.scores.base import Additive, Chain
from foveate.scores.bias import Bias, KeyBias
from foveate.scores.distance import ALiBi
from foveate.scores.pairs import Pairs
from foveate.scores.relative import RelativeTable
from foveate.scores.temperature import SoftCap

B, H, N, FIRST = 2, 3, 12, 4


def tensors(n_k):
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, N, 8), (B, H, n_k, 8), (B, H, n_k, 8))
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


SCORES = {
    "table": RelativeTable(torch.randn(H, 5, 7).double(), Grid(3, 4)),
    "alibi": ALiBi(torch.rand(H).double()),
    "keys": KeyBias(torch.randn(B, H, N).double()),
    "one": KeyBias(torch.randn(H, 1).double()),
    "map": Bias(torch.randn(1, 1, N, N).double()),
    "cap": SoftCap(0.5),
    "both": ALiBi(torch.rand(H).double()) + SoftCap(0.5),
}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize(
    ("where", "backend"),
    [(None, "reference"), (Causal(), "reference"), (Causal(), "tiles"), (SlidingWindow(3, 2), "tiles")],
)
def test_the_score_sees_its_range_and_leaves_the_rest(name, where, backend):
    n_k = FIRST + N + 3
    q, k, v = tensors(n_k)
    score = SCORES[name]
    logits = q @ k.transpose(-1, -2) * 8**-0.5
    inner = logits[..., FIRST : FIRST + N]
    for part in score.parts if isinstance(score, Chain) else (score,):
        inner = part.apply(inner, Pairs.full(N, N))
    logits = torch.cat([logits[..., :FIRST], inner, logits[..., FIRST + N :]], -1)
    if where is not None:
        logits = logits.masked_fill(~where.dense(N, n_k), float("-inf"))
    lifted = on_keys(score, FIRST, N)
    out = attend(q, k, v, where=where, score=lifted, backend=backend)
    torch.testing.assert_close(out, logits.softmax(-1) @ v)


def test_additive_stays_additive_and_gradients_flow():
    table = torch.randn(H, 5, 7, dtype=torch.float64, requires_grad=True)
    lifted = on_keys(RelativeTable(table, Grid(3, 4)), FIRST, N)
    assert isinstance(lifted, Additive)
    assert list(lifted.tensors()) == ["table"]
    q, k, v = tensors(FIRST + N)
    attend(q, k, v, score=lifted).sum().backward()
    assert table.grad is not None
    assert not isinstance(on_keys(SoftCap(1.0), 0, N), Additive)
    assert repr(on_keys(SoftCap(1.0), 0, N)) == "OnKeys(score=SoftCap(cap=1.0), first=0, n=12)"


def test_an_empty_range_changes_nothing():
    q, k, v = tensors(N)
    for score in (ALiBi(torch.rand(H).double()), SoftCap(0.1)):
        torch.testing.assert_close(attend(q, k, v, score=on_keys(score, 3, 0)), attend(q, k, v))


def test_what_does_not_fit_is_named():
    with pytest.raises(ArgumentError, match="first"):
        on_keys(SoftCap(1.0), -1, 3)
    q, k, v = tensors(N)
    with pytest.raises(ArgumentError, match="keys below 12"):
        attend(q, k, v, score=on_keys(SoftCap(1.0), 3, N))
    with pytest.raises(ArgumentError, match="N_k"):
        attend(q, k, v, score=on_keys(RelativeTable(torch.zeros(H, 5, 7).double(), Grid(3, 4)), 0, 3))
