"""`scan` from outside: all forms equal the contract, in values and gradients, in every direction."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate.kernels.scan import chunk, normalized_scan, scan, scan_step
from tests.kernels.scan.cases import KINDS, Case, cases, make, oracle

FORMS = ("reference", "recurrent", "chunk")


def run(case: Case, backend: str, **options):
    return scan(
        case.q,
        case.k,
        case.v,
        decay=case.decay,
        initial_state=case.state,
        return_state=True,
        backend=backend,
        chunk=case.chunk,
        **options,
    )


def gradients(case: Case, compute):
    """Gradients of a fixed combination of output and state with respect to all leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in case.leaves]
    q, k, v, state, *decay = leaves
    out, final = compute(Case(q, k, v, decay[0] if decay else case.decay, state, case.chunk))
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    loss = loss + (final * torch.linspace(-1, 2, final.numel(), dtype=out.dtype).view_as(final)).sum()
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("backend", FORMS)
@given(case=cases())
def test_every_form_equals_the_contract(backend, case):
    out, state = oracle(case, scale=0.7)
    got, last = run(case, backend, scale=0.7)
    torch.testing.assert_close(got, out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", FORMS)
@given(case=cases(max_n=17))
def test_gradients_of_every_form_equal_the_contracts(backend, case):
    expected = gradients(case, oracle)
    got = gradients(case, lambda c: run(c, backend))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("causal", [True, "reverse", False])
@given(case=cases(max_n=20))
def test_sequences_without_states_take_the_short_way(causal, case):
    assume(case.q.shape[2] > 0)
    call = {"decay": case.decay, "causal": causal}
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    expected = scan(*leaves, **call, backend="reference")
    got = scan(*leaves, **call, chunk=case.chunk)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weigh = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    for ours, theirs in zip(
        torch.autograd.grad((got * weigh).sum(), leaves),
        torch.autograd.grad((expected * weigh).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("n", [63, 64, 65, 127, 128, 129, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_the_default_size_equal_the_recurrence(n, kind):
    case = make(n, n=n, kind=kind, strong=0.05, size=0.1, chunk=64)
    for ours, theirs in zip(run(case, "chunk"), run(case, "recurrent"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("together", [1, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_more_chunks_than_are_computed_together(kind, together, monkeypatch):
    monkeypatch.setattr(chunk, "TOGETHER", together)  # one chunk, or six
    case = make(b=1, h=2, n=91, kind=kind, size=0.05, chunk=4)
    for ours, theirs in zip(run(case, "chunk"), run(case, "recurrent"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    got = gradients(case, lambda c: run(c, "chunk"))
    for ours, theirs in zip(got, gradients(case, lambda c: run(c, "recurrent")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@given(case=cases(), cut=st.floats(0, 1))
def test_a_state_carries_over_any_cut(case, cut):
    at = int(cut * case.q.shape[2])
    whole, last = run(case, "chunk")
    parts, state = [], case.state
    for part in (slice(0, at), slice(at, None)):
        decay = case.decay
        if isinstance(decay, torch.Tensor) and decay.ndim > 2:
            decay = decay[:, :, part]
        q, k, v = (x[:, :, part] for x in (case.q, case.k, case.v))
        out, state = run(Case(q, k, v, decay, state, case.chunk), "chunk")
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


@given(case=cases(max_n=12))
def test_steps_equal_the_scan(case):
    whole, last = run(case, "chunk", scale=0.5)
    state = case.state
    for t in range(case.q.shape[2]):
        decay = case.decay
        if isinstance(decay, torch.Tensor) and decay.ndim > 2:
            decay = decay[:, :, t]
        q, k, v = (x[:, :, t] for x in (case.q, case.k, case.v))
        out, state = scan_step(q, k, v, state, decay=decay, scale=0.5)
        torch.testing.assert_close(out, whole[:, :, t], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_a_step_leaves_the_given_state_alone():
    case = make(n=1)
    before = case.state.clone()
    scan_step(case.q[:, :, 0], case.k[:, :, 0], case.v[:, :, 0], case.state, decay=-0.5)
    assert torch.equal(case.state, before)


@pytest.mark.parametrize("backend", FORMS)
@given(case=cases(max_n=20))
def test_reverse_reads_the_sequence_from_its_end(backend, case):
    def flip(x):
        return x.flip(2) if isinstance(x, torch.Tensor) and x.ndim > 2 and x.shape[2] > 1 else x

    mirrored = Case(flip(case.q), flip(case.k), flip(case.v), flip(case.decay), case.state, case.chunk)
    out, state = oracle(mirrored)
    got, last = run(case, backend, causal="reverse")
    torch.testing.assert_close(got, out.flip(2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(last, state, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", [*FORMS, "auto"])
@given(case=cases(max_n=20))
def test_both_directions_count_the_own_pair_once(backend, case):
    case.state = torch.zeros_like(case.state)
    forward, _ = run(case, "reference")
    backward, _ = run(case, "reference", causal="reverse")
    k, v = (x.repeat_interleave(case.q.shape[1] // x.shape[1], 1) for x in (case.k, case.v))
    own = (case.q * k).sum(-1, keepdim=True) * v
    got = scan(case.q, case.k, case.v, decay=case.decay, causal=False, backend=backend, chunk=case.chunk)
    torch.testing.assert_close(got, forward + backward - own, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_both_directions_with_a_constant_decay_fade_with_distance(backend, kind):
    case = make(n=9, kind="head")
    got = scan(case.q, case.k, case.v, decay=case.decay, causal=False, backend=backend, chunk=4)
    i = torch.arange(9)
    fade = (case.decay.view(-1, 1, 1) * (i[:, None] - i).abs()).exp()
    torch.testing.assert_close(got, (case.q @ case.k.mT * fade) @ case.v)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("causal", [True, "reverse", False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_equal_separate_ones(backend, causal, kind):
    case = make(b=1, n=14, kind=kind)
    ids = torch.tensor([[-1, 4, 4, 4, -1, 4, 7, 7, 4, 4, 4, 4, -1, -1]])
    runs = [[1, 2, 3, 5], [6, 7], [8, 9, 10, 11]]
    # What padding holds must not matter, not even NaN.
    for x in (case.q, case.k, case.v):
        x[:, :, [0, 4, 12, 13]] = torch.nan
    if kind in ("token", "channel", "shared"):
        case.decay[:, :, [4]] = -torch.inf
    got = scan(
        case.q,
        case.k,
        case.v,
        decay=case.decay,
        causal=causal,
        segments=ids,
        backend=backend,
        chunk=4,
    )
    expected = torch.zeros_like(got)
    for run_ids in runs:
        decay = case.decay
        if isinstance(decay, torch.Tensor) and decay.ndim > 2:
            decay = decay[:, :, run_ids]
        q, k, v = (x[:, :, run_ids] for x in (case.q, case.k, case.v))
        expected[:, :, run_ids] = scan(q, k, v, decay=decay, causal=causal, backend="reference")
    torch.testing.assert_close(got, expected)


def test_states_pass_padding_and_belong_to_the_outer_sequences():
    case = make(n=8, kind="head")
    ids = torch.tensor([[-1, 0, 0, 3, 3, 3, -1, -1]]).expand(2, -1)
    out, last = run(case, "chunk", segments=ids)
    first = Case(*(x[:, :, 1:3] for x in (case.q, case.k, case.v)), case.decay, case.state, 4)
    final = Case(
        *(x[:, :, 3:6] for x in (case.q, case.k, case.v)), case.decay, torch.zeros_like(case.state), 4
    )
    torch.testing.assert_close(out[:, :, 1:3], oracle(first)[0])
    torch.testing.assert_close(last, oracle(final)[1])


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(backend, kind, causal):
    case = make(b=1, n=6, kind=kind, chunk=4)
    leaves = [x.requires_grad_() for x in case.leaves]

    def compute(q, k, v, state, *decay):
        g = decay[0] if decay else case.decay
        if causal is False:
            return scan(q, k, v, decay=g, causal=False, backend=backend, chunk=4)
        return run(Case(q, k, v, g, state, 4), backend)

    assert torch.autograd.gradcheck(compute, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", FORMS)
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_double_backward(backend, kind):
    case = make(b=1, h=1, n=5, dk=2, dv=2, kind=kind, chunk=2)
    leaves = [x.requires_grad_() for x in case.leaves]

    def compute(q, k, v, state, decay):
        return run(Case(q, k, v, decay, state, 2), backend)

    assert torch.autograd.gradgradcheck(compute, leaves, fast_mode=True)


def test_auto_takes_the_chunk_form_and_the_recurrence_for_one_token():
    for n, form in ((1, "recurrent"), (37, "chunk")):
        case = make(n=n, kind="head").to(torch.float32)
        assert torch.equal(run(case, "auto")[0], run(case, form)[0])


@pytest.mark.parametrize(("kind", "size"), [("none", 64), ("head", 64), ("token", 32), ("channel", 64)])
def test_chunks_are_as_long_as_suits_the_decay(kind, size):
    case = make(n=150, kind=kind)
    options = {"decay": case.decay, "return_state": True}
    for ours, theirs in zip(
        scan(case.q, case.k, case.v, **options),
        scan(case.q, case.k, case.v, **options, chunk=size),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_the_normalised_scan_is_a_weighted_mean():
    case = make(n=11, kind="token")
    q, k = case.q.abs(), case.k.abs()
    out, state = normalized_scan(q, k, case.v, decay=case.decay, scale=0.3, return_state=True, chunk=4)
    w = weights_of(q, k, case.decay)
    torch.testing.assert_close(out, (w / w.sum(-1, keepdim=True)) @ case.v)
    assert state.shape == (*case.state.shape[:3], case.v.shape[-1] + 1)
    again = normalized_scan(q, k, case.v, decay=case.decay, scale=0.3, chunk=4)
    assert torch.equal(out, again)
    nothing = normalized_scan(torch.zeros_like(q), k, case.v, decay=case.decay)
    assert not nothing.any()


def weights_of(q, k, decay):
    n = q.shape[2]
    eye = torch.eye(n, dtype=q.dtype).expand(*q.shape[:2], n, n)
    return scan(q, k, eye, decay=decay, backend="reference")


def test_an_input_gate_is_a_factor_on_keys_or_values():
    """S_t = exp(g_t) S_{t-1} + (i_t k_t) (j_t v_t)^T needs no argument of its own; D u is an ordinary sum."""
    case = make(n=9, kind="channel")
    k_gate, v_gate = torch.rand_like(case.k), torch.rand_like(case.v)
    state, outs = case.state, []
    for t in range(9):
        pair = (k_gate * case.k)[:, :, t, :, None] * (v_gate * case.v)[:, :, t, None]
        state = case.decay[:, :, t, :, None].exp() * state + pair
        outs.append((case.q[:, :, t, None] @ state).squeeze(2))
    case.k, case.v = case.k * k_gate, case.v * v_gate
    torch.testing.assert_close(run(case, "chunk")[0], torch.stack(outs, 2))
