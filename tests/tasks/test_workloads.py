"""The data of every workload: held out, deterministic, with honest trivial answers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import ArgumentError, MissingExtraError, UnknownNameError
from foveate.tasks import digits, photos, restore, text
from foveate.tasks.train import Trainer
from foveate.tasks.workload import make_workload, workload_keys
from tests.tasks.stand_ins import build

SMALL = {
    "image": {"test_size": 24},
    "restore": {"test_size": 4},
    "text": {"test_size": 4, "length": 64},
    "recall": {"test_size": 8, "length": 48, "pairs": 4, "keys": 8, "before": 2},
}


@pytest.fixture(params=sorted(SMALL))
def workload(request):
    return make_workload(request.param, **SMALL[request.param])


def test_every_learning_workload_is_here():
    assert set(SMALL) | {"shapes"} == set(workload_keys())


def test_batches_fit_the_network_and_repeat(workload):
    spec = workload.spec
    one, two, other = workload.batch(3, size=2), workload.batch(3, size=2), workload.batch(4, size=2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True) if a is not None)
    assert not torch.equal(one.inputs, other.inputs)
    if spec.inputs == "pixels":
        assert one.inputs.shape == (2, spec.in_features, *(s * spec.patch for s in spec.grid))
        assert 0.3 < one.inputs.std() < 3  # of order one, so that position does not drown it
    else:
        assert one.inputs.shape == (2, spec.grid.numel)
        assert 0 <= one.inputs.min() <= one.inputs.max() < spec.in_features


def test_a_step_of_training_and_scores_by_example(workload):
    trainer = Trainer(workload, lambda spec, seed: build("mean", spec, seed=seed))
    assert math.isfinite(trainer.advance(1))
    found = trainer.evaluate()
    assert found.n == workload.test_size
    assert math.isfinite(found.quality)
    assert found.quality_se >= 0
    batch = next(workload.test_batches(4))
    out = torch.randn(len(batch.inputs), workload.grid.numel, workload.spec.out_features)
    assert all(v.shape == (len(batch.inputs),) for v in workload.scores(out, batch).values())


def test_test_data_does_not_depend_on_the_batch_size(workload):
    few = torch.cat([b.inputs for b in workload.test_batches(3)])
    many = torch.cat([b.inputs for b in workload.test_batches(1000)])
    assert torch.equal(few, many)


def test_options_rebuild_the_workload(workload):
    again = make_workload(workload.key, **workload.options())
    assert again.spec == workload.spec
    assert torch.equal(again.batch(0, size=2).inputs, workload.batch(0, size=2).inputs)


def test_the_floor_is_the_best_trivial_answer(workload):
    name, value = workload.floor()
    values = workload.baselines().values()
    assert value == (max if workload.higher_is_better else min)(values)
    assert workload.baselines()[name] == value


# -- image ---------------------------------------------------------------------------------------------------


def test_digits_are_whole_apart_and_labelled():
    workload = make_workload("image", test_size=64)
    images, classes = digits.load_digits()
    batch = workload.batch(0, size=64)
    pixels = batch.inputs[:, 0] / 4.0 + 0.1
    known = images[: digits.TRAIN_DIGITS].unfold(0, 1, 1).squeeze(-1)
    for i in range(64):
        windows = pixels[i].unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64)
        near = torch.cdist(windows, known.reshape(-1, 64)).min(0)
        found = (near.values < 1e-3).nonzero()[:, 0]
        assert set(classes[found].tolist()) >= set(batch.targets[i, :, 0].tolist())
    here, there, match = batch.targets.unbind(2)
    assert torch.equal(match[:, 0], (here[:, 0] == here[:, 1]).long())
    asked = there != -100
    assert torch.equal(asked[:, 0], match[:, 0] == 0)
    assert torch.equal(there[asked], here.flip(1)[asked])
    assert 0.3 < match.double().mean() < 0.7
    rows = batch.where.unflatten(2, (16, 16)).amax(3).argmax(2)
    cols = batch.where.unflatten(2, (16, 16)).amax(2).argmax(2)
    assert ((rows[:, 0] - rows[:, 1]).abs().maximum((cols[:, 0] - cols[:, 1]).abs()) >= 7).all()


def test_held_out_digits_are_never_trained_on():
    workload = make_workload("image", strokes=0, test_size=16)
    images, _ = digits.load_digits()
    held_out = images[digits.TRAIN_DIGITS :].reshape(-1, 64)
    train = workload.batch(5, size=32).inputs[:, 0] / 4.0 + 0.1
    windows = train.unfold(1, 8, 1).unfold(2, 8, 1).reshape(-1, 64)
    copies = (held_out[:, None] == images[: digits.TRAIN_DIGITS].reshape(1, -1, 64)).all(-1).any()
    assert not copies
    assert torch.cdist(windows, held_out).min() > 1e-3


def test_a_perfect_answer_scores_one_and_the_majority_what_it_should():
    workload = make_workload("image", test_size=200)
    batch = next(workload.test_batches(200))
    out = torch.zeros(200, 256, 22)
    for d in range(2):
        inside = batch.where[:, d] > 0
        for start, target in zip((0, 10, 20), batch.targets[:, d].T, strict=True):
            marks = torch.zeros(200, 22)
            marks[torch.arange(200), start + target.clamp_min(0)] = 1.0
            out += torch.where(inside[..., None], marks[:, None], 0.0)
    assert workload.scores(out, batch)["quality"].mean() == 1.0
    # Chance is 1/10, 1/9 where asked, 1/2.
    assert 0.2 < workload.floor()[1] < 0.36


def test_own_pictures_by_class(tmp_path):
    from skimage import io

    for name, level in (("dark", 10), ("light", 240)):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = (torch.rand(20, 30, 3) * 10 + level - 5 * (i % 2)).to(torch.uint8).numpy()
            io.imsave(tmp_path / name / f"{i}.png", pixels, check_contrast=False)
    workload = make_workload("image", folder=tmp_path)
    assert workload.classes == ["dark", "light"]
    assert workload.baselines() == {"majority": 0.5}
    trainer = Trainer(workload, lambda spec, seed: build("nothing", spec, seed=seed))
    trainer.advance(5)
    assert trainer.evaluate().quality == 1.0
    with pytest.raises(ArgumentError, match=r"folder: .*two sub-folders"):
        make_workload("image", folder=tmp_path / "dark")


# -- restore -------------------------------------------------------------------------------------------------


def test_answering_the_difference_restores_perfectly_and_nothing_leaves_the_input():
    workload = make_workload("restore", test_size=4)
    batch = next(workload.test_batches(4))
    seen = batch.inputs / 4.0 + 0.5
    p, (h, w) = workload.patch, workload.grid.sizes
    change = (batch.targets - seen) / restore.UNIT
    tokens = change.reshape(4, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(4, h * w, -1)
    torch.testing.assert_close(workload.restored(tokens, batch), batch.targets, atol=1e-5, rtol=0)
    nothing = workload.scores(torch.zeros_like(tokens), batch)["quality"].mean().item()
    assert nothing == pytest.approx(workload.baselines()["noisy input"], abs=1e-4)
    # Noise of 0.1 is 20 dB; clipping to [0, 1] helps a little.
    assert 20.0 < nothing < 22.0


def test_psnr_is_its_definition():
    a, b = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 8, 8)
    expected = -10 * ((a - b) ** 2).mean((1, 2, 3)).log10()
    torch.testing.assert_close(restore.psnr(a, b), expected)


@given(st.floats(0.3, 2.0))
def test_blur_keeps_constants_and_shrinks_noise(sigma):
    assert torch.allclose(restore.blur(torch.full((1, 3, 12, 12), 0.7), sigma), torch.tensor(0.7))
    noise = torch.randn(1, 3, 24, 24)
    assert restore.blur(noise, sigma).std() < noise.std()


def test_upscaling_starts_from_bicubic():
    workload = make_workload("restore", task="upscale", test_size=2)
    batch = next(workload.test_batches(2))
    torch.testing.assert_close(batch.inputs / 4 + 0.5, restore.halve_and_back(batch.targets))
    assert workload.floor()[0] == "bicubic"


def test_train_and_test_are_different_photographs():
    assert not set(photos.TRAIN) & set(photos.TEST)
    assert all(p.shape[0] == 3 and min(p.shape[1:]) >= 96 for p in photos.bundled("test"))


def test_own_photographs_are_split(tmp_path):
    from skimage import io

    for i in range(5):
        io.imsave(tmp_path / f"{i}.png", torch.randint(0, 255, (100, 120), dtype=torch.uint8).numpy())
    workload = make_workload("restore", folder=tmp_path, test_size=2)
    assert (len(workload.pictures("test")), len(workload.pictures("train"))) == (2, 3)
    assert workload.batch(0).inputs.shape == (4, 3, 96, 96)
    (tmp_path / "9.png").write_bytes(b"not an image")
    with pytest.raises(ArgumentError, match=r"folder: .*9\.png"):
        make_workload("restore", folder=tmp_path).batch(0)
    (tmp_path / "9.png").unlink()
    with pytest.raises(ArgumentError, match=r"folder: .*at least 2 photographs"):
        make_workload("restore", folder=tmp_path, side=128).batch(0)


# -- text ----------------------------------------------------------------------------------------------------


def test_targets_are_the_next_characters():
    batch = make_workload("text", length=32).batch(0)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_bigrams_of_a_text_with_known_entropy(tmp_path):
    """In "abab..." a character is one bit alone and none after its neighbour."""
    path = tmp_path / "ab.txt"
    path.write_text("ab" * 20000)
    table = make_workload("text", file=path, length=64).baselines()
    assert table["unigram"] == pytest.approx(1.0, abs=1e-3)
    assert table["bigram"] == pytest.approx(0.0, abs=1e-2)


def test_new_characters_share_one_id():
    train, test, used = text.encode("aab", "abz")
    assert train.tolist() == [1, 1, 2]
    assert test.tolist() == [1, 2, text.UNKNOWN]
    assert used == 3


def test_the_documentation_is_split_by_topic():
    train, test = text.documentation()
    assert len(train) > 4 * len(test) > 40_000
    assert test[:200] not in train


def test_what_is_hard_for_everybody_is_not_noise():
    """The trivial answer's lead over itself is nothing everywhere, however hard the windows are."""
    workload = make_workload("text", **SMALL["text"])
    found = workload.evaluate(lambda x: workload._tables()[1][x])
    assert found.quality == pytest.approx(workload.baselines()["bigram"])
    assert found.quality_se < 1e-6
    assert workload.evaluate(lambda x: workload._tables()[0].expand(*x.shape, text.ROOM)).quality_se > 1e-3


# -- recall --------------------------------------------------------------------------------------------------


def test_answers_are_the_values_shown_with_the_keys():
    workload = make_workload("recall", length=40, pairs=5, keys=9, values=4)
    batch = workload.batch(0)
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        table = dict(zip(ids[0:10:2], ids[1:10:2], strict=True))
        assert len(table) == 5
        assert targets[:10] == [-100] * 10
        assert [table[k] - 9 for k in ids[10:]] == targets[10:]


def test_every_question_needs_a_pair_of_its_own_example():
    """Neither the keys nor the questions before tell the values: the same keys have others in the next example."""
    workload = make_workload("recall", **SMALL["recall"])
    ids = torch.cat([workload.batch(step).inputs for step in range(20)])
    keys, values = ids[:, 0:8:2], ids[:, 1:8:2] - 8
    assert keys.sort(1).values.diff(dim=1).gt(0).all()
    table = torch.zeros(8, 16).index_put_((keys, values), torch.ones(()), accumulate=True)
    assert (table.max(1).values / table.sum(1)).max() < 0.2
    assert ids[:, 8:].max() < 8


def test_recall_is_solved_by_looking_back_and_by_nothing_less():
    """What attention would do, written down: all is right; with the last pair out of sight, its questions are not."""
    workload = make_workload("recall", length=48, pairs=4, keys=8, test_size=64)

    def look_back(first):
        def answer(ids):
            keys, values = ids[:, first:8:2], ids[:, first + 1 : 8 : 2] - 8
            weights = (ids[:, :, None] == keys[:, None]).float()
            return weights @ torch.nn.functional.one_hot(values, 16).float()

        return workload.evaluate(answer).quality

    assert look_back(0) == 1
    assert workload.floor()[1] < look_back(2) < 0.9


def test_a_short_race_tells_attention_from_nothing():
    """Full attention leaves the best trivial answer behind in sixty steps; what mixes no tokens does not."""
    workload = make_workload("recall", length=48, pairs=8, keys=8, test_size=64)
    found = {}
    for key in ("dense", "nothing"):
        trainer = Trainer(workload, lambda spec, seed, key=key: build(key, spec, seed=seed))
        trainer.advance(60)
        found[key] = trainer.evaluate().quality
    assert found["dense"] > 0.8
    assert found["nothing"] < workload.floor()[1] + 0.05


# -- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "options", "name"),
    [
        ("image", {"patch": 4}, "patch"),
        ("image", {"canvas": 31}, "canvas"),
        ("image", {"strokes": -1}, "strokes"),
        ("image", {"test_size": 1}, "test_size"),
        ("restore", {"task": "colour"}, "task"),
        ("restore", {"side": 64}, "side"),
        ("restore", {"noise": 0}, "noise"),
        ("restore", {"folder": "/nowhere"}, "folder"),
        ("text", {"length": 2}, "length"),
        ("text", {"file": "/nowhere.txt"}, "file"),
        ("recall", {"pairs": 33}, "pairs"),
        ("recall", {"length": 20, "pairs": 10}, "length"),
        ("recall", {"before": -1}, "before"),
        ("recall", {"values": 1}, "values"),
        ("image", {"heads": 5}, "dim"),
    ],
)
def test_bad_options_are_named(key, options, name):
    with pytest.raises(ArgumentError, match=f"^{name}:"):
        make_workload(key, **options).batch(0)


def test_bad_files_are_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe\x00\x81" * 9)
    with pytest.raises(ArgumentError, match=r"file: .*UTF-8"):
        make_workload("text", file=path).batch(0)
    path.write_text("too short")
    with pytest.raises(ArgumentError, match=r"file: .*at least"):
        make_workload("text", file=path).batch(0)


def test_unknown_workloads_are_named():
    with pytest.raises(UnknownNameError, match="'image'"):
        make_workload("imag")
    with pytest.raises(ArgumentError, match="shapes"):
        make_workload("shapes")


@pytest.mark.parametrize(("module", "call"), [("sklearn.datasets", digits.load_digits.__wrapped__)])
def test_a_missing_extra_names_the_pip_line(monkeypatch, module, call):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'foveate\[compare\]'"):
        call()
