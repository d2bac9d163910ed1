"""What `scan` refuses, by name, and the documented answers for empty inputs."""

import pytest
import torch

from foveate.core.errors import ArgumentError, UnknownNameError
from foveate.kernels.scan import scan, scan_step
from foveate.kernels.scan.contract import segment_resets
from tests.kernels.scan.cases import make

CASE = make(b=2, h=4, hkv=2, n=6, dk=3, dv=5, kind="head").to(torch.float32)


def call(**changed):
    given = {"q": CASE.q, "k": CASE.k, "v": CASE.v, "decay": CASE.decay} | changed
    return scan(given.pop("q"), given.pop("k"), given.pop("v"), **given)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": CASE.q[0]}, r"^q: expected 4 axes"),
        ({"q": CASE.q.long()}, r"^q: expected a floating point dtype"),
        ({"k": CASE.k.long()}, r"^k: expected a floating point dtype"),
        ({"k": CASE.k[:1]}, r"^k: expected \(2, heads, 6, 3\)"),
        ({"k": CASE.k[..., :2]}, r"^k: expected \(2, heads, 6, 3\)"),
        ({"k": CASE.k[:, :, :4]}, r"^k: expected"),
        ({"v": CASE.v[:, :1]}, r"^v: expected \(2, 2, 6, 'D_v'\)"),
        ({"q": CASE.q[:, :3], "decay": None}, r"^k: expected a number of heads that divides the 3"),
        ({"v": CASE.v.double()}, r"^q, k, v: expected one dtype"),
        ({"decay": torch.zeros(3)}, r"^decay: expected \(H,\) = \(4,\)"),
        ({"decay": torch.zeros(2, 4)}, r"^decay: expected a number, or a tensor"),
        ({"decay": torch.zeros(2, 4, 5)}, r"^decay: expected .* Axes of size 1 are repeated"),
        ({"decay": torch.zeros(2, 4, 6, 2)}, r"^decay: "),
        ({"decay": torch.zeros(4, dtype=torch.long)}, r"^decay: expected a floating point log decay"),
        ({"decay": torch.tensor([0.0, -1, -1, 0.9])}, r"^decay: expected log decays <= 0, got 0\.89.*log"),
        ({"decay": 0.5}, r"^decay: expected log decays <= 0, got 0\.5"),
        ({"initial_state": torch.zeros(2, 2, 3, 5)}, r"^initial_state: expected \(2, 4, 3, 5\)"),
        ({"initial_state": torch.zeros(2, 4, 3, 5).long()}, r"^initial_state: expected a floating"),
        ({"initial_state": torch.zeros(2, 4, 3, 5), "causal": False}, r"^causal: expected True or"),
        ({"return_state": True, "causal": False}, r"^causal: expected True or"),
        ({"causal": 1}, r"^causal: expected True, False or"),
        ({"causal": "left"}, r"^causal: expected True, False or"),
        ({"segments": torch.zeros(2, 6)}, r"^segments: expected signed integer ids"),
        ({"segments": torch.zeros(2, 5, dtype=torch.long)}, r"^segments: expected \(2, 6\)"),
        ({"chunk": 0}, r"^chunk: expected a positive number"),
        ({"chunk": 2.5}, r"^chunk: expected a positive number"),
    ],
)
def test_refusals_name_the_argument(changed, message):
    with pytest.raises(ArgumentError, match=message):
        call(**changed)


def test_other_devices_are_refused():
    for name in ("k", "v"):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected the device of q"):
            call(**{name: getattr(CASE, name).to("meta")})
    for name in ("decay", "initial_state"):
        with pytest.raises(ArgumentError, match=rf"^{name}: expected the device of q"):
            call(
                **{name: torch.zeros(2, 4, 3, 5, device="meta") if name != "decay" else CASE.decay.to("meta")}
            )


def test_unknown_backends_are_named():
    with pytest.raises(UnknownNameError, match=r"'chunked' is not known\. Did you mean 'chunk'"):
        call(backend="chunked")


def test_steps_check_their_shapes():
    q, k, v = CASE.q[:, :, 0], CASE.k[:, :, 0], CASE.v[:, :, 0]
    with pytest.raises(ArgumentError, match=r"^q: expected 3 axes"):
        scan_step(CASE.q, k, v)
    with pytest.raises(ArgumentError, match=r"^decay:"):
        scan_step(q, k, v, decay=torch.zeros(2, 4, 1, 3))
    with pytest.raises(ArgumentError, match=r"^initial_state:"):
        scan_step(q, k, v, torch.zeros(2, 4, 3, 4))


@pytest.mark.parametrize("backend", ["reference", "recurrent", "chunk", "auto"])
@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
@pytest.mark.parametrize(("b", "n"), [(2, 0), (0, 5), (0, 0)])
def test_nothing_in_gives_nothing_out(backend, kind, b, n):
    case = make(b=b, n=n, kind=kind)
    out, state = scan(
        case.q,
        case.k,
        case.v,
        decay=case.decay,
        initial_state=case.state,
        return_state=True,
        backend=backend,
        chunk=4,
    )
    assert out.shape == case.v.shape
    if n == 0:
        assert torch.equal(state, case.state)
    assert scan(case.q, case.k, case.v, decay=case.decay, causal=False, backend=backend).shape == out.shape


def test_grouped_heads_equal_repeated_ones():
    out = call()
    repeated = call(k=CASE.k.repeat_interleave(2, 1), v=CASE.v.repeat_interleave(2, 1))
    assert torch.equal(out, repeated)


def test_axes_of_size_one_are_repeated():
    decay = torch.tensor([-0.3])
    assert torch.equal(call(decay=decay), call(decay=-0.3))
    assert torch.equal(call(decay=decay.expand(4)), call(decay=-0.3))
    per_channel = -torch.rand(1, 4, 1, 3)
    torch.testing.assert_close(call(decay=per_channel), call(decay=per_channel.expand(2, 4, 6, 3)))


def test_resets_stand_at_the_first_token_of_every_later_sequence():
    ids = torch.tensor([[-1, 3, -1, 3, 5, -1, 3, 3]])
    resets, padding = segment_resets(ids)
    assert resets.int().tolist() == [[0, 0, 0, 0, 1, 0, 1, 0]]
    assert padding.int().tolist() == [[1, 0, 1, 0, 0, 1, 0, 0]]
    assert segment_resets(ids[:, :0])[0].shape == (1, 0)
