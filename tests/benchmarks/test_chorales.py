"""The chorale benchmark: its tokens, its n-grams, its scores, and that the model learns what n-grams cannot."""

import math
import os

import pytest
import torch
from torch import nn

from benchmarks import chorales
from benchmarks.chorales import FIRST, HOLD, REST, START, VOCAB, Ngram, nats, sounding, train, windows
from foveate.models.language import language_model


def music21():
    """The package: optional where tests are quick, required in `make test-all`."""
    if os.environ.get("FOVEATE_ALL") == "1":
        import music21

        return music21
    return pytest.importorskip("music21")


def canons(count, steps=48, lag=2):
    """Pieces whose lower voices begin the soprano's notes again, each `lag` sixteenths after the one above."""
    pieces = []
    for _ in range(count):
        line = torch.full((steps,), HOLD)
        line[::2] = torch.randint(FIRST, FIRST + 8, (steps // 2,))
        voices = [torch.cat([torch.full((lag * v,), REST), line])[:steps] for v in range(4)]
        pieces.append(torch.stack(voices, dim=1))
    return pieces


def small(steps=0, pieces=None, **options):
    model = language_model(
        "music_transformer", vocab=VOCAB, context=64, dim=64, heads=2, depth=1, positions=False, **options
    )
    if steps:
        train(model, pieces, steps=steps, batch=8, context=64, seed=0, lr=1e-2)
    return model.eval()


def test_ngrams_give_distributions_that_back_off():
    pieces = canons(3)
    gram = Ngram((1, 2), pieces)
    line = pieces[0].flatten().tolist()[:48]
    total = 0.0
    for event in range(VOCAB):
        # Twelve whole sixteenths, and one more event.
        with_it = gram.nats([torch.tensor([[*line, event]])]) * 49
        total += math.exp(gram.nats([torch.tensor([line])]) * 48 - with_it)
    assert total == pytest.approx(1)
    # Nothing counted: every event is as likely.
    assert Ngram((1,), []).nats(pieces) == pytest.approx(math.log(VOCAB))
    assert gram.nats(pieces) < Ngram((), pieces).nats(pieces)


class Same(nn.Module):
    """Knows nothing, and counts how many tokens it was asked about."""

    def forward(self, tokens):
        return torch.zeros(*tokens.shape, VOCAB)


@pytest.mark.parametrize("steps", [3, 24, 25, 60])
def test_every_event_is_judged_once(steps):
    assert nats(Same(), [torch.randint(1, VOCAB, (steps, 4))], 96) == pytest.approx(math.log(VOCAB), rel=1e-5)


def test_windows_start_with_a_sixteenth_behind_a_start_token():
    piece = torch.arange(1, 41).view(10, 4)
    drawn = windows([piece, piece[:3]], 16, 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 17)
    assert drawn[:, 0].eq(START).all()
    assert (drawn[:, 1] % 4).eq(1).all()
    full = drawn[drawn[:, -1] != START]
    assert full[:, 1:].diff(dim=1).eq(1).all()
    assert set(full[:, 1].tolist()) == {1, 5, 9, 13, 17, 21, 25}


def test_the_model_learns_a_canon_that_ngrams_do_not_hear():
    pieces = canons(24)
    kept, held = pieces[:20], pieces[20:]
    best = min(Ngram(back, kept).nats(held) for back in ((1,), (1, 2), (1, 4)))
    assert nats(small(120, kept), held, 64) < 0.7 * best


def test_events_survive_a_score_and_a_midi_file(tmp_path):
    music21()
    piece = torch.tensor(
        [
            [FIRST + 30, REST, FIRST + 10, FIRST],
            [HOLD, HOLD, HOLD, HOLD],
            [FIRST + 30, FIRST + 20, REST, HOLD],
            [FIRST + 28, HOLD, HOLD, REST],
            [HOLD, HOLD, FIRST + 12, HOLD],
        ]
    )
    again = chorales.read_score(chorales.write_score(piece))
    assert torch.equal(again, piece)
    assert chorales.written(piece, tmp_path / "piece.mid")
    assert sounding(piece)[3] == [FIRST + 28, FIRST + 20, 0, 0]


def test_a_model_composes_and_its_music_is_read_back(tmp_path):
    music21()
    piece = chorales.composed(small(), 24, 0)
    assert piece.shape == (24, 4)
    assert (piece != START).all()
    assert chorales.written(piece, tmp_path / "piece.mid")


def test_the_corpus_is_read():
    music21()
    kept, held = chorales.chorales(10)
    assert (len(kept), len(held)) == (9, 1)
    for piece in (*kept, *held):
        assert piece.shape[1] == 4
        assert len(piece) % 4 == 0
        assert int(piece.min()) == HOLD
        assert int(piece.max()) < VOCAB
        # Most events begin nothing, and soprano and bass move as much as chorales do.
        assert 0.05 < float((piece >= FIRST).float().mean()) < 0.5
        heard = torch.tensor(sounding(piece))
        assert (heard[:, 0] >= heard[:, 3]).float().mean() > 0.95


@pytest.mark.slow
def test_real_chorales_are_learned_better_than_by_counting(capsys, tmp_path):
    music21()
    small = ["--pieces", "120", "--steps", "250", "--midi", str(tmp_path / "chorale.mid"), "--threads", "1"]
    assert chorales.main(small) == 0
    assert "better than every n-gram" in capsys.readouterr().out
    assert (tmp_path / "chorale.mid").stat().st_size > 100
