"""URPE: what its equations promise."""

import pytest
import torch
from torch import nn

from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.cost.explain import explain
from foveate.kernels.attend import attend
from foveate.kernels.cpu.library import absent
from foveate.mechanisms.projections import merge_heads
from foveate.mechanisms.scored.urpe import UniversalEncoder, UniversalPosition, UniversalRelativeAttention
from foveate.scores.after import Multiply
from foveate.scores.buckets import ClippedOffsets, SignedBuckets, T5Buckets
from foveate.scores.pairs import Pairs


def layer(dim=12, heads=3, seed=True, **options):
    module = UniversalRelativeAttention(dim=dim, heads=heads, **options)
    if seed:
        nn.init.normal_(module.position.bias)
        nn.init.normal_(module.position.factor)
    return module.double()


def tokens(n, dim=12, batch=2):
    return torch.randn(batch, n, dim).double()


@pytest.mark.parametrize("causal", [True, False])
def test_a_new_layer_is_relative_attention(causal):
    module, x = layer(seed=False, causal=causal), tokens(9)
    score, after = module.position()
    assert after.factor.table.eq(1).all()
    want = UniversalRelativeAttention(dim=12, heads=3, tables=False, causal=causal).double()
    want.load_state_dict({n: p for n, p in module.state_dict().items() if "position" not in n})
    torch.testing.assert_close(module(x, Grid(9)), want(x, Grid(9), position=(score, None)))
    small = UniversalPosition(3, SignedBuckets(), SignedBuckets(), constant=False)
    assert small.factor.abs().max() < 0.2


def test_a_triangular_factor_is_causal_attention_that_is_not_normalised_again():
    q, k, v = torch.randn(3, 2, 3, 7, 4).double()
    triangle = torch.ones(7, 7).double().tril()
    out = attend(q, k, v, after=Multiply(triangle))
    full = (q @ k.mT * 0.5).softmax(-1) * triangle
    torch.testing.assert_close(out, full @ v)
    rows = full.sum(-1)
    torch.testing.assert_close(out / rows.unsqueeze(-1), attend(q, k, v, mask=triangle.bool()))
    assert rows[..., :-1].max() < 1


@pytest.mark.parametrize("rule", [SignedBuckets(8, 12), T5Buckets(), ClippedOffsets(20)], ids=repr)
def test_it_is_its_equation(rule):
    module, x = layer(bias=rule, factor=rule), tokens(9)
    q, k, v = module.qkv(x)
    table = rule(torch.arange(9) - torch.arange(9)[:, None])
    weights = (q @ k.mT / 2 + module.position.bias[:, table]).softmax(-1) * module.position.factor[:, table]
    torch.testing.assert_close(module(x, Grid(9)), module.proj(merge_heads(weights @ v)))
    assert (weights.sum(-1) - 1).abs().max() > 0.1


def test_equal_tokens_look_alike_without_factors_only():
    x = tokens(1).expand(-1, 10, -1)
    plain = layer()
    nn.init.ones_(plain.position.factor)
    out = plain(x, Grid(10))
    torch.testing.assert_close(out, out[:, :1].expand_as(out))
    module = layer()
    v = module.qkv(x)[2]
    score, after = module.position()
    weights = score.apply(torch.zeros(2, 3, 10, 10).double(), Pairs.full(10, 10)).softmax(-1)
    factors = after.apply(weights, Pairs.full(10, 10)).sum(-1, keepdim=True)
    want = module.proj(merge_heads(factors * v[:, :, :1]))
    got = module(x, Grid(10))
    torch.testing.assert_close(got, want)
    assert (got[:, 1:] - got[:, :1]).abs().amax(-1).min() > 1e-3


class Identifier(nn.Module):
    """Says at which position a token stands, when all tokens are the same."""

    def __init__(self, n, factors):
        super().__init__()
        self.n = n
        self.embed = nn.Parameter(torch.randn(16))
        self.mix = UniversalRelativeAttention(dim=16, heads=8, tables=False)
        every = ClippedOffsets(n - 1)
        self.position = UniversalPosition(8, every, every if factors else None)
        self.out = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 64), nn.GELU(), nn.Linear(64, n))

    def forward(self):
        x = self.embed.expand(1, self.n, -1)
        return self.out(x + self.mix(x, Grid(self.n), position=self.position()))[0]


def identified(factors, n=16, steps=150):
    torch.manual_seed(0)
    model, labels = Identifier(n, factors), torch.arange(n)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(), labels).backward()
        optimizer.step()
    return float((model().argmax(-1) == labels).float().mean())


def test_one_layer_learns_positions_that_relative_attention_cannot():
    assert identified(True) == 1.0
    assert identified(False) == 1 / 16


def test_layers_of_a_model_share_two_tables_with_a_row_per_bucket_and_head():
    rule = SignedBuckets(16, 20)
    options = {"vocab": 11, "dim": 16, "heads": 4, "hidden": 32, "padding": 1}
    counts = []
    for depth in (1, 3):
        model = UniversalEncoder(**options, depth=depth, bias=rule, factor=rule)
        tables = {n: p.numel() for n, p in model.named_parameters() if "position" in n}
        counts.append(tables)
    assert counts[0] == counts[1] == {"position.bias": 4 * 15, "position.factor": 4 * 15}
    # A table with every offset of T tokens costs heads * (2 T - 1).
    assert UniversalPosition(4, None, ClippedOffsets(24 - 1)).factor.numel() == 4 * (2 * 24 - 1)


def test_padding_is_seen_by_nobody():
    rule = SignedBuckets(16, 20)
    model = UniversalEncoder(
        vocab=11, dim=16, heads=4, depth=2, hidden=32, padding=1, bias=rule, factor=rule, embedding_norm=True
    ).eval()
    ids = torch.randint(2, 11, (2, 9))
    ids[:, 6:] = 1
    torch.testing.assert_close(model(ids)[:, :6], model(ids[:, :6]))


def test_prefill_and_steps_equal_the_forward_pass():
    module, x = layer(causal=True, bias=SignedBuckets(8, 12)), tokens(14)
    whole = module(x, Grid(14))
    out, past = module.prefill(x[:, :5])
    torch.testing.assert_close(out, whole[:, :5])
    out, past = module.prefill(x[:, 5:11], past)
    torch.testing.assert_close(out, whole[:, 5:11])
    for t in range(11, 14):
        out, past = module.step(x[:, t], past)
        torch.testing.assert_close(out, whole[:, t])


@pytest.mark.skipif(absent() is not None, reason="the C++ core is not built")
def test_pairs_and_what_the_core_says():
    needed = [explain((1, 3, n, 4), (1, 3, n, 4), (1, 3, n, 4)).pairs_needed for n in (16, 32, 64)]
    assert needed == [3 * n * n for n in (16, 32, 64)]
    with pytest.raises(UnsupportedError, match="Multiply changes the weights"):
        layer(causal=True, backend="cpu").float()(tokens(8).float(), Grid(8))


def test_low_precision_stays_near():
    module, x = layer(seed=False), tokens(16)
    exact = module(x, Grid(16))
    low = module.bfloat16()(x.bfloat16(), Grid(16))
    assert (low.double() - exact).abs().max() < 0.05


def test_bad_arguments_are_named():
    module, x = layer(), tokens(4)
    with pytest.raises(ArgumentError, match=r"^position:"):
        module(x, Grid(4), position=module.position())
    with pytest.raises(ArgumentError, match=r"^position:"):
        UniversalRelativeAttention(dim=12, heads=3, tables=False).double()(x, Grid(4))
    with pytest.raises(ArgumentError, match=r"^causal:"):
        module.prefill(x)
    with pytest.raises(ArgumentError, match=r"^activation:"):
        UniversalEncoder(
            vocab=3, dim=4, heads=2, depth=1, hidden=4, bias=None, factor=None, activation="tanh"
        )
