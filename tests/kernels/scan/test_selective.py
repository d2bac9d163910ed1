"""The selective scan: every form equals the plain recurrence and `scan`, in values and gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.kernels.scan import pieces, scan, selective_scan, selective_states, selective_step

FORMS = ("pieces", "recurrent", "reference")
NAMES = ("u", "dt", "A", "B", "C", "D", "initial_state")


def make(seed=0, *, b=2, g=2, n=11, c=3, s=2, size=0.5, dtype=torch.float64):
    """The arguments of one call; `size` scales the log decays, and one step in five keeps or empties a state."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    dt = torch.rand(b, g, n, c, generator=draw, dtype=torch.float64)
    lot = torch.rand(b, g, n, c, generator=draw)
    dt = torch.where(lot < 0.1, 0.0, torch.where(lot > 0.9, 1e4, dt)) if size > 1 else dt
    values = (
        normal(b, g, n, c),
        dt,
        -size * (0.1 + torch.rand(g, c, s, generator=draw, dtype=torch.float64)),
        normal(b, g, n, s),
        normal(b, g, n, s),
        normal(g, c),
        normal(b, g, s, c),
    )
    return {name: value.to(dtype) for name, value in zip(NAMES, values, strict=True)}


def oracle(given):
    """The definition, one token, state and channel at a time."""
    u, dt, A, B, C, D, state = (given[name] for name in NAMES)
    outs = []
    for t in range(u.shape[2]):
        state = torch.exp(dt[:, :, t, None] * A.mT) * state
        state = state + B[:, :, t, :, None] * (dt * u)[:, :, t, None]
        outs.append((C[:, :, t, :, None] * state).sum(2) + D * u[:, :, t])
    return torch.stack(outs, 2), state


def run(given, backend="auto", **options):
    return selective_scan(**given, return_state=True, backend=backend, **options)


def gradients(given, compute):
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given.items()}
    y, last = compute(leaves)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum() + last.sin().sum()
    return torch.autograd.grad(loss, list(leaves.values()))


@st.composite
def cases(draw):
    return make(
        draw(st.integers(0, 10**6)),
        b=draw(st.integers(1, 2)),
        g=draw(st.integers(1, 3)),
        n=draw(st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33])),
        c=draw(st.integers(1, 4)),
        s=draw(st.integers(1, 3)),
        size=draw(st.sampled_from([0.0, 1e-8, 0.5, 30.0])),
    )


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "TOGETHER", 1)  # 16 tokens each


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("backend", FORMS)
def test_every_form_equals_the_definition(backend):
    @given(case=cases())
    def check(case):
        for ours, theirs in zip(run(case, backend), oracle(case), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)

    check()


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("backend", FORMS)
def test_gradients_of_every_form_equal_the_definitions(backend):
    @given(case=cases())
    def check(case):
        expected = gradients(case, oracle)
        for ours, theirs in zip(gradients(case, lambda c: run(c, backend)), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)

    check()


def test_it_is_the_scan_with_one_head_per_channel():
    case = make(n=70, c=3, s=4)
    u, dt, A, B, C = (case[name] for name in NAMES[:5])
    q, k = (x.repeat_interleave(3, 1) for x in (C, B))
    v = (dt * u).transpose(2, 3).flatten(1, 2).unsqueeze(-1)
    decay = torch.einsum("bgnc,gcs->bgcns", dt, A).flatten(1, 2)
    heads = scan(q, k, v, decay=decay, chunk=16).unflatten(1, (2, 3)).squeeze(-1).transpose(2, 3)
    torch.testing.assert_close(selective_scan(u, dt, A, B, C), heads)


def test_one_decay_for_all_states_and_channels_is_the_scan_of_one_head():
    case = make(n=40, c=5, s=4)
    u, B, C = case["u"], case["B"], case["C"]
    dt = case["dt"][..., :1].expand_as(u)
    out = selective_scan(u, dt, -torch.ones(1, 5, 4, dtype=u.dtype), B, C)
    torch.testing.assert_close(out, scan(C, B, dt * u, decay=-dt[..., 0]))


def test_memory_fades_fully_or_not_at_all():
    case = make(n=9)
    u, dt, A, B, C, D = (case[name] for name in NAMES[:6])
    alone = selective_scan(u, dt.clamp(min=0.1), A * 1e6, B, C)
    torch.testing.assert_close(alone, (C * B).sum(-1, keepdim=True) * dt.clamp(min=0.1) * u)
    sums = torch.einsum("bgns,bgnc->bgnsc", B, dt * u).cumsum(2)
    torch.testing.assert_close(selective_scan(u, dt, A * 0, B, C), torch.einsum("bgns,bgnsc->bgnc", C, sums))
    torch.testing.assert_close(selective_scan(u, dt, A, B, C * 0, D=D), D[:, None] * u)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("backend", FORMS)
def test_reverse_and_packed_sequences(backend):
    case = make(n=37)
    flipped = {k: v.flip(2) if k in ("u", "dt", "B", "C") else v for k, v in case.items()}
    y, last = run(flipped, backend)
    got, state = run(case, backend, causal="reverse")
    torch.testing.assert_close((got, state), (y.flip(2), last))
    case.pop("initial_state")
    ids = torch.tensor([[-1] + [4] * 17 + [-1] + [4] * 3 + [7] * 13 + [-1] * 2])
    for name in ("u", "dt", "B", "C"):
        case[name][:, :, ids[0] < 0] = torch.nan
    leaves = {k: v.requires_grad_() for k, v in case.items()}
    for causal in (True, "reverse"):
        got = selective_scan(**leaves, segments=ids, causal=causal, backend=backend)
        expected = torch.zeros_like(got)
        for this in (4, 7):
            part = {k: v[:, :, ids[0] == this] if k in ("u", "dt", "B", "C") else v for k, v in case.items()}
            expected[:, :, ids[0] == this] = selective_scan(**part, causal=causal, backend="recurrent")
        torch.testing.assert_close(got, expected)
        assert all(x.isfinite().all() for x in torch.autograd.grad(got.sum(), list(leaves.values())))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("causal", [True, "reverse"])
def test_states_of_every_token(causal):
    case = make(n=35)
    C, D = case.pop("C"), case.pop("D")
    states = selective_states(**case, causal=causal)
    y = selective_scan(**case, C=C, D=D, causal=causal)
    torch.testing.assert_close(torch.einsum("bgns,bgnsc->bgnc", C, states) + D[:, None] * case["u"], y)
    leaves = [x.requires_grad_() for x in make(1, b=1, g=1, n=18, c=2).values()]

    def call(u, dt, A, B, C, D, state):
        return selective_states(u, dt, A, B, initial_state=state, causal=causal)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.usefixtures("short_pieces")
def test_gradcheck_and_double_backward():
    leaves = [x.requires_grad_() for x in make(b=1, n=19, c=2).values()]

    def call(u, dt, A, B, C, D, state):
        return selective_scan(u, dt, A, B, C, D=D, initial_state=state, return_state=True)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_steps_and_states_carry_over():
    case = make(n=9)
    whole, last = run(case)
    state = case["initial_state"]
    A, D = case["A"], case["D"]
    for t in range(9):
        u, dt, B, C = (case[name][:, :, t] for name in ("u", "dt", "B", "C"))
        y, state = selective_step(u, dt, A, B, C, state, D=D)
        torch.testing.assert_close(y, whole[:, :, t])
    torch.testing.assert_close(state, last)


def test_half_precision_keeps_float32_states_and_autocast_does_not_round():
    case = make(n=50, c=8, s=4, dtype=torch.bfloat16)
    y, last = run(case)
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    exact = run({k: v.double() for k, v in case.items()})
    torch.testing.assert_close(last.double(), exact[1], rtol=1e-4, atol=1e-4)
    wide = {k: v.float() for k, v in case.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run(wide)[0], run(wide)[0].float())
        torch.testing.assert_close(run(wide)[0].double(), exact[0], rtol=1e-4, atol=1e-4)


def test_a_hundred_thousand_tokens_stay_exact():
    case = make(b=1, g=1, n=100_000, c=1, s=1, size=1e-3)
    single = {k: v.float() for k, v in case.items()}
    for ours, theirs in zip(run(single), run(case), strict=True):
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_shapes_alone_have_a_result():
    case = {k: v.to("meta") for k, v in make(n=40).items()}
    y, last = run(case)
    assert (y.shape, last.shape) == ((2, 2, 40, 3), (2, 2, 2, 3))


def test_no_token():
    y, last = run(make(n=0))
    assert y.shape == (2, 2, 0, 3)
    assert torch.equal(last, make(n=0)["initial_state"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"u": torch.randn(2, 11, 3)}, r"^u: expected 4 axes"),
        ({"u": torch.ones(2, 2, 11, 3, dtype=torch.long)}, r"^u: expected a floating"),
        ({"dt": torch.rand(2, 2, 11, 1)}, r"^dt: expected \(2, 2, 11, 3\)"),
        ({"dt": -torch.ones(2, 2, 11, 3)}, r"^dt: expected step sizes >= 0"),
        ({"A": torch.ones(2, 3, 2)}, r"^A: expected values <= 0"),
        ({"A": -torch.ones(3, 2)}, r"^A: expected \(2, 3, S\)"),
        ({"B": torch.randn(2, 2, 11, 5)}, r"^B: expected 2 states"),
        ({"C": torch.randn(2, 1, 11, 2)}, r"^C: expected \(2, 2, 11\)"),
        ({"D": torch.randn(3)}, r"^D: expected \(2, 3\)"),
        ({"initial_state": torch.randn(2, 2, 3, 2)}, r"^initial_state: expected \(2, 2, 2, 3\)"),
        ({"causal": False}, r"^causal: expected True"),
        ({"segments": torch.zeros(1, 5, dtype=torch.long)}, r"^segments: expected"),
    ],
)
def test_what_cannot_be_is_named(changed, message):
    with pytest.raises(ArgumentError, match=message):
        selective_scan(**(make(dtype=torch.float32) | changed))


def test_unknown_backends_are_named():
    with pytest.raises(UnknownNameError, match="backend of selective_scan 'chunk'"):
        run(make(), "chunk")
