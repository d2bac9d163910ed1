"""Music Transformer: what its equations promise."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.core.errors import ArgumentError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.mechanisms.scored.music_transformer import RelativeGlobalAttention, relative_attention
from foveate.models.language import language_model
from foveate.patterns.basic import Causal
from foveate.patterns.offsets import Spans


def draw(n=11, n_q=None, h=2, h_kv=2, d=6, e=4, dtype=torch.float64):
    q = torch.randn(2, h, n_q or n, d, dtype=dtype)
    return q, torch.randn(2, h_kv, n, d, dtype=dtype), torch.randn(2, h_kv, n, e, dtype=dtype)


def by_pairs(q, k, v, table, values, causal, block):
    """The equations, pair by pair."""
    h, n, m = q.shape[1], k.shape[2], table.shape[-2]
    start = n - q.shape[2]
    table = table.expand(h, -1, -1)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    zero = m - 1 if causal else m // 2
    for i in range(q.shape[2]):
        at = start + i
        seen = [j for j in range(n) if not causal or j <= at]
        if block is not None:
            seen = [j for j in seen if at // block - j // block <= 1]
        rows = {j: zero + j - at for j in seen if 0 <= zero + j - at < m}
        logits = torch.stack(
            [
                (q[:, :, i] * k[:, :, j]).sum(-1)
                + ((q[:, :, i] * table[:, rows[j]]).sum(-1) if j in rows else 0.0)
                for j in seen
            ],
            dim=-1,
        )
        weights = (logits * q.shape[-1] ** -0.5).softmax(-1)
        for c, j in enumerate(seen):
            value = v[:, :, j]
            if values is not None and j in rows:
                value = value + values.expand(h, -1, -1)[:, rows[j]]
            out[:, :, i] += weights[..., c, None] * value
    return out


@pytest.mark.parametrize(("causal", "block"), [(True, None), (False, None), (True, 4), (True, 16)], ids=str)
@pytest.mark.parametrize("rows", [5, 11, 15])  # fewer distances than tokens, as many, more
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("with_values", [True, False])
def test_it_is_its_equation_pair_by_pair(causal, block, rows, share, with_values):
    lead = () if share else (2,)
    for n_q in (11, 3, 1):
        q, k, v = draw(11, n_q)
        table = torch.randn(*lead, rows, 6).double()
        values = torch.randn(*lead, rows, 4).double() if with_values else None
        got = relative_attention(q, k, v, table, values, causal=causal, block=block)
        torch.testing.assert_close(got, by_pairs(q, k, v, table, values, causal, block))


def test_official_leaves_values_out_of_the_first_block_only():
    (q, k, v), table, values = draw(11), torch.randn(8, 6).double(), torch.randn(8, 4).double()
    right = relative_attention(q, k, v, table, values, block=4)
    theirs = relative_attention(q, k, v, table, values, block=4, official=True)
    bare = relative_attention(q, k, v, table, block=4)
    torch.testing.assert_close(theirs[:, :, :4], bare[:, :, :4])
    torch.testing.assert_close(theirs[:, :, 4:], right[:, :, 4:])
    for n_q in (1, 3, 8, 9):
        part = relative_attention(q[:, :, -n_q:], k, v, table, values, block=4, official=True)
        torch.testing.assert_close(part, theirs[:, :, -n_q:])
    torch.testing.assert_close(
        relative_attention(q, k, v, table, values, block=6, official=True),
        relative_attention(q, k, v, table, block=6),
    )


@pytest.mark.parametrize("causal", [True, False])
def test_without_embeddings_it_is_plain_attention(causal):
    q, k, v = draw(h=4)
    table = torch.zeros(7, 6, dtype=torch.float64)
    want = attend(q, k, v, where=Causal() if causal else None)
    torch.testing.assert_close(relative_attention(q, k, v, table, causal=causal), want)


def test_constant_tokens_give_a_pattern_of_distances():
    q = torch.ones(1, 1, 9, 6).double()
    eye = torch.eye(9).double()[None, None]
    weights = relative_attention(q, q, eye, torch.randn(4, 6).double())[0, 0]
    # Rows differ by their sums only: ratios to the diagonal depend on the distance alone.
    ratio = weights / weights.diagonal()[:, None]
    for t in range(9):
        line = ratio.diagonal(-t)
        torch.testing.assert_close(line, line[:1].expand_as(line))
    assert not torch.isclose(ratio[1, 0], ratio[2, 0])
    torch.testing.assert_close(ratio[4, 0], ratio[8, 0])  # both beyond the table


def test_a_query_changes_its_own_row_only():
    q, k, v = draw(h=1, h_kv=1)
    table = torch.randn(5, 6).double()
    before = relative_attention(q, k, v, table)
    q[:, :, 4] += 1
    changed = (relative_attention(q, k, v, table) - before).abs().amax((0, 1, 3)) > 1e-9
    assert changed.nonzero().flatten().tolist() == [4]


class Copier(nn.Module):
    def __init__(self, max_distance):
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.mix = RelativeGlobalAttention(dim=16, heads=1, max_distance=max_distance)
        self.out = nn.Linear(16, 6)

    def forward(self, ids):
        return self.out(self.mix(self.embed(ids), Grid(ids.shape[1])))


def copy_accuracy(max_distance, back=4, steps=150):
    torch.manual_seed(0)
    model = Copier(max_distance)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(steps):
        ids = torch.randint(0, 6, (16, 20))
        loss = nn.functional.cross_entropy(model(ids)[:, back:].flatten(0, 1), ids[:, :-back].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(0, 6, (64, 20))
    return float((model(ids).argmax(-1)[:, back:] == ids[:, :-back]).float().mean())


def test_one_head_learns_to_copy_from_a_distance_without_absolute_positions():
    assert copy_accuracy(8) > 0.98
    assert copy_accuracy(2) < 0.6  # the distance has no vector of its own


@pytest.mark.parametrize("options", [{}, {"block": 5}, {"relative_values": True}, {"share": True}], ids=str)
def test_prefill_and_steps_equal_the_forward_pass(options):
    module = RelativeGlobalAttention(dim=16, heads=2, max_distance=9, **options).double()
    x = torch.randn(2, 24, 16).double()
    whole = module(x, Grid(24))
    out, past = module.prefill(x[:, :3])
    torch.testing.assert_close(out, whole[:, :3])
    for first, last in ((3, 8), (8, 10), (10, 21)):
        out, past = module.prefill(x[:, first:last], past)
        torch.testing.assert_close(out, whole[:, first:last])
    for t in range(21, 24):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor had that any operator made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if hasattr(x, "shape")
        ]
        self.numel = max([self.numel, *found])
        return out


def test_embeddings_never_spread_over_pairs():
    n, d = 128, 64
    q, k, v = (torch.randn(1, 1, n, d) for _ in range(3))
    for causal in (True, False):
        with Largest() as largest:
            relative_attention(q, k, v, torch.randn(2 * n - 1, d), torch.randn(2 * n - 1, d), causal=causal)
        assert largest.numel <= 3 * n * n < n * n * d


def test_the_local_version_is_linear():
    pairs = []
    for n in (256, 512, 1024):
        q = (1, 2, n, 8)
        pairs.append(explain(q, q, q, where=Causal() & Spans(32, 32, -1, 0)).pairs_needed)
    own, before = 32 * 33 // 2, 32 * 32
    assert pairs == [2 * (n // 32 * own + (n // 32 - 1) * before) for n in (256, 512, 1024)]


def test_grouped_keys_masks_and_low_precision():
    q, k, v = draw(20, h=4, h_kv=2)
    table = torch.randn(4, 6, 6).double()
    want = relative_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), table)
    torch.testing.assert_close(relative_attention(q, k, v, table), want)
    keep = torch.arange(20) >= 3
    got = relative_attention(q, k, v, table, mask=keep)[:, :, 3:]
    cut = relative_attention(*(x[:, :, 3:] for x in (q, k, v)), table)
    torch.testing.assert_close(got, cut)
    # A mask per pair follows the queries of a stretch that starts in the middle of a block.
    full = torch.rand(20, 20) > 0.3
    whole = relative_attention(q, k, v, table, block=4, mask=full)
    torch.testing.assert_close(
        relative_attention(q[:, :, 7:], k, v, table, block=4, mask=full[7:]), whole[:, :, 7:]
    )
    low = relative_attention(*(x.bfloat16() for x in (q, k, v)), table.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.double() - want).abs().max() < 0.1


def test_a_language_model_around_it_samples_beyond_its_context():
    model = language_model(
        "music_transformer", vocab=11, context=16, dim=16, heads=2, depth=2, positions=False
    ).eval()
    prompt = torch.randint(0, 11, (2, 5))
    long = model.generate(prompt, 20, temperature=0)
    torch.testing.assert_close(model(long[:, :-1])[:, 4:].argmax(-1), long[:, 5:])


def test_bad_arguments_are_named():
    q, k, v = draw()
    with pytest.raises(ArgumentError, match=r"^table:"):
        relative_attention(q, k, v, torch.zeros(3, 5, 6).double())
    with pytest.raises(ArgumentError, match=r"^table:"):
        relative_attention(q, k, v, torch.zeros(4, 6).double(), causal=False)
    with pytest.raises(ArgumentError, match=r"^value_table:"):
        relative_attention(q, k, v, torch.zeros(4, 6).double(), torch.zeros(5, 4).double())
    with pytest.raises(ArgumentError, match=r"^block:"):
        RelativeGlobalAttention(dim=16, heads=2, causal=False, block=4)
    with pytest.raises(ArgumentError, match=r"^max_distance:"):
        RelativeGlobalAttention(dim=16, heads=2, max_distance=0)
    with pytest.raises(ArgumentError, match=r"^causal:"):
        RelativeGlobalAttention(dim=16, heads=2, causal=False).step(torch.zeros(1, 16))
