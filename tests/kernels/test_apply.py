import pytest
import torch
import torch.nn.functional as F

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.kernels.attend import apply
from foveate.patterns.basic import Causal
from foveate.patterns.grids import Windows
from foveate.patterns.lower import lower
from foveate.patterns.schedule import Mean
from foveate.patterns.selection import Selection


def test_dense_weights_are_a_product():
    w, v = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 5, 6)
    torch.testing.assert_close(apply(w, v), w @ v)
    shared = torch.randn(1, 2, 5, 6)
    torch.testing.assert_close(apply(w, shared), w @ shared.repeat_interleave(2, 1))


def test_weights_outside_the_pattern_count_nothing():
    w, v = torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 3)
    w[..., 0, 4] = float("nan")
    torch.testing.assert_close(apply(w, v, Causal()), w.tril().nan_to_num() @ v)


def test_cells_of_windows():
    where = Windows(Grid(4, 4), 2)
    schedule = lower(where, 16, 16)
    v, weights, dense = torch.randn(2, 3, 16, 5), [], torch.zeros(2, 3, 16, 16)
    for group in schedule.groups:
        w = torch.randn(2, 3, group.n_cells, group.tq, group.tk)
        weights.append(w)
        q, k, m = group.q_ids()[0, 0], group.k_ids()[0, 0], group.mask()
        for c in range(group.n_cells):
            block = w[:, :, c] if m is None else w[:, :, c] * m[0, 0, c % m.shape[2]]
            dense[:, :, q[c][:, None], k[c][None]] = block
    given = weights[0] if len(weights) == 1 else weights
    torch.testing.assert_close(apply(given, v, schedule), dense @ v)


def test_overlapping_cells_fold_as_outlook_attention_does():
    """Each 3x3 patch sends weighted values to its 9 places; overlapping places add up ."""
    n, kk = 5, 9
    v = torch.randn(1, 2, n * n, 4)
    ids = F.unfold(torch.arange(n * n).float().reshape(1, 1, n, n) + 1, 3, padding=1).mT.long() - 1
    ids = ids[:, None]
    where = Selection(ids, ids, n_q=n * n, n_k=n * n, combine="sum")
    w = torch.randn(1, 2, n * n, kk, kk)
    patches = F.unfold(v.transpose(-2, -1).reshape(2, 4, n, n), 3, padding=1).reshape(2, 4, kk, n * n)
    folded = torch.einsum("hpij,hcjp->hcip", w[0], patches).reshape(2, 4 * kk, n * n)
    want = F.fold(folded, (n, n), 3, padding=1).reshape(1, 2, 4, n * n).mT
    torch.testing.assert_close(apply(w, v, where), want)


def test_mean_over_cells():
    ids = torch.tensor([[0, 1], [1, 2]]).reshape(1, 1, 2, 2)
    where = Selection(ids, ids, n_q=4, n_k=4, combine=Mean())
    out = apply(torch.eye(2).expand(1, 1, 2, 2, 2), torch.arange(1.0, 5).reshape(1, 1, 4, 1), where)
    assert out.flatten().tolist() == [1, 2, 3, 0]


def test_gradients():
    ids = torch.tensor([[0, 1], [1, -1]]).reshape(1, 1, 2, 2)
    where = Selection(ids, ids, n_q=3, n_k=3, combine="sum")
    w = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, v: apply(w, v, where), (w, v))
    dense = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, v: apply(w, v, Causal()), (dense, v))


def test_cells_over_a_single_key_hold_it_once():
    ids = torch.tensor([[-1, 0, -1]]).reshape(1, 1, 1, 3)
    where = Selection(ids, ids, n_q=1, n_k=1, combine="sum")
    w, v = torch.randn(2, 2, 1, 3, 3), torch.randn(2, 2, 1, 5)
    torch.testing.assert_close(apply(w, v, where), w[:, :, 0, 1:2, 1:2] @ v)


def test_no_keys_give_zeros():
    assert (apply(torch.zeros(1, 2, 3, 0), torch.zeros(1, 2, 0, 4)) == torch.zeros(1, 2, 3, 4)).all()


def test_bad_arguments_are_named():
    ids = torch.tensor([[0, 1], [1, 2]]).reshape(1, 1, 2, 2)
    summed = Selection(ids, ids, n_q=3, n_k=3, combine="sum")
    w, v = torch.ones(2, 2, 3, 3), torch.ones(2, 2, 3, 4)
    cases = (
        (w, v[0], None, r"^v: .*4 dimensions"),
        (w.long(), v, None, r"^weights: "),
        (w[0], v, None, r"^weights: "),
        (w[..., :2], v, None, r"^weights: "),
        (w, v.to("meta"), None, r"^weights.device"),
        (torch.ones(2, 3, 3, 3), v, None, r"^v: .*divides the 3 heads"),
        (torch.ones(3, 2, 3, 3), v, None, r"^batch"),
        (torch.ones(2, 2, 2, 2, 2), v, Causal(), r"^where: .*lower"),
        (torch.ones(2, 2, 2, 2, 3), v, summed, r"^weights: .*\(2, 2, 2\)"),
        (w, v, summed, r"^weights: .*per cell"),
        (torch.ones(2, 2, 2, 2, 2), torch.ones(2, 2, 4, 4), summed, r"^v: .*3 rows"),
    )
    for weights, values, where, message in cases:
        with pytest.raises(ArgumentError, match=message):
            apply(weights, values, where)
