"""Does Music Transformer learn Bach's four-part chorales better than counting does, and can it write one?

    python benchmarks/chorales.py [--steps 500] [--context 256] [--midi chorale.mid] [--threads 1] [--repeats 1]

The chorales are those of the corpus that the package music21 brings (`pip install 'foveate[music]'`). Time is cut into
sixteenths; at every sixteenth stand four events, of soprano, alto, tenor and bass in this order: a pitch where a note
begins, a rest where one begins, or "hold" for as long as either lasts. Every tenth chorale is held out. A small
decoder-only transformer with relative attention and no other positions is trained on windows that start at a random
sixteenth, each after one start token, and judged in nats per event of the held-out chorales: every event counts once,
behind half a window or all there is. Beside it stand n-grams with Witten-Bell smoothing over the same events, all told
which voice is next: the 2-gram and 3-gram of the events as they come, and a 3-gram that sees the event before and the
voice's own last one. In the end the model writes a chorale, which goes into a MIDI file and is read back from there.
The run fails when it does not beat the n-grams or when the file says something else than the model did.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from foveate.core.errors import need_extra
from foveate.measure.fingerprint import fingerprint
from foveate.models.language import LanguageModel, language_model

VOICES = ("soprano", "alto", "tenor", "bass")
START, HOLD, REST, FIRST = 0, 1, 2, 3
LOWEST, HIGHEST = 36, 84  # of the pitches, as MIDI counts them
VOCAB = FIRST + HIGHEST - LOWEST + 1
PER_QUARTER = 4


def music21() -> Any:
    """Return the package.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        import music21
    except ImportError:
        raise need_extra("music21", "music") from None
    return music21


def read_score(score: Any) -> Tensor | None:
    """Return the events (steps, 4) of a music21 score; None when it has not four parts in sixteenths."""
    if len(score.parts) != len(VOICES):
        return None
    columns, steps = [], math.ceil(float(score.highestTime) * PER_QUARTER)
    for part in score.parts:
        events, last = [REST] + [HOLD] * (steps - 1), None
        for note in part.flatten().notes:
            if not note.quarterLength:  # an ornament
                continue
            start, length = (float(x) * PER_QUARTER for x in (note.offset, note.quarterLength))
            pitch = max(p.midi for p in note.pitches)
            if start % 1 or length % 1 or not LOWEST <= pitch <= HIGHEST:
                return None
            at, end = int(start), int(start + length)
            tied = note.tie is not None and note.tie.type in ("stop", "continue") and last == (pitch, at)
            events[at:end] = [HOLD] * (end - at)
            if not tied:
                events[at] = FIRST + pitch - LOWEST
            if end < steps:
                events[end] = REST  # until the next note overwrites it
            last = pitch, end
        columns.append(events)
    return torch.tensor(columns).T


def write_score(events: Tensor) -> Any:
    """Return a music21 score of events (steps, 4), the way back of `read_score`."""
    m = music21()
    score = m.stream.Score()
    for voice, column in zip(VOICES, events.T.tolist(), strict=True):
        part = m.stream.Part(id=voice)
        starts = [0] + [i for i, event in enumerate(column) if event != HOLD and i]
        for at, end in zip(starts, [*starts[1:], len(column)], strict=True):
            sounds = column[at] >= FIRST
            note = m.note.Note(column[at] - FIRST + LOWEST) if sounds else m.note.Rest()
            note.quarterLength = (end - at) / PER_QUARTER
            part.insert(at / PER_QUARTER, note)
        score.insert(0, part)
    return score


def sounding(events: Tensor) -> list[list[int]]:
    """Return the pitch (0: none) of every voice at every step: what is heard, whoever writes rests how."""
    heard, last = [], [0] * len(VOICES)
    for row in events.tolist():
        last = [
            old if event == HOLD else event * (event >= FIRST) for event, old in zip(row, last, strict=True)
        ]
        heard.append(last)
    while heard and not any(heard[-1]):
        heard.pop()
    return heard


def chorales(limit: int | None = None) -> tuple[list[Tensor], list[Tensor]]:
    """Read the corpus and return the events of the chorales to train on and of those held out."""
    corpus = music21().corpus
    paths = sorted(p for p in corpus.getComposer("bach") if p.name.startswith("bwv"))
    found = []
    for path in paths:
        events = read_score(corpus.parse(path))
        if events is not None:
            found.append(events)
        if limit is not None and len(found) == limit:
            break
    return [x for i, x in enumerate(found) if i % 10 != 9], [x for i, x in enumerate(found) if i % 10 == 9]


class Ngram:
    """Events from the voice and a few events before, smoothed by Witten and Bell's rule.

    Args:
        back: how far back the events stand that are looked at, nearest first; shorter contexts leave out the last.
        pieces: events (steps, 4) to count.
    """

    def __init__(self, back: tuple[int, ...], pieces: Iterable[Tensor]):
        self.back = back
        self.counts: dict[tuple, Counter] = defaultdict(Counter)
        for piece in pieces:
            line = piece.flatten().tolist()
            for t, event in enumerate(line):
                for context in self._contexts(line, t):
                    self.counts[context][event] += 1

    def _contexts(self, line: list[int], t: int) -> Iterator[tuple]:
        before = tuple(line[t - b] if t >= b else START for b in self.back)
        for n in range(len(self.back) + 1):
            yield t % len(VOICES), before[:n]

    def nats(self, pieces: Iterable[Tensor]) -> float:
        """Return the mean of -log p(event)."""
        total, number = 0.0, 0
        for piece in pieces:
            line = piece.flatten().tolist()
            for t, event in enumerate(line):
                p = 1 / VOCAB
                for context in self._contexts(line, t):
                    seen = self.counts.get(context)
                    if seen:
                        kinds = len(seen)
                        p = (seen[event] + kinds * p) / (seen.total() + kinds)
                total, number = total - math.log(p), number + 1
        return total / number


def windows(pieces: list[Tensor], context: int, batch: int, draw: torch.Generator) -> Tensor:
    """Draw windows of `context` events behind a start token, each from a random sixteenth on."""
    lengths = torch.tensor([max(len(x) - context // len(VOICES), 0) + 1.0 for x in pieces])
    rows = []
    for i in torch.multinomial(lengths, batch, replacement=True, generator=draw).tolist():
        first = int(torch.randint(int(lengths[i]), (), generator=draw))
        events = pieces[i].flatten()[first * len(VOICES) :][:context]
        rows.append(torch.nn.functional.pad(events, (1, context - len(events)), value=START))
    return torch.stack(rows)


def train(
    model: LanguageModel,
    pieces: list[Tensor],
    *,
    steps: int,
    batch: int,
    context: int,
    seed: int,
    lr: float = 4e-3,
) -> None:
    """Train with Adam and a learning rate that rises and falls; padding behind short pieces counts nothing."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * s / steps))
    )
    for _ in range(steps):
        tokens = windows(pieces, context, batch, draw)
        logits = model(tokens[:, :-1])
        loss = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=START)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def nats(model: LanguageModel, pieces: Iterable[Tensor], context: int) -> float:
    """Return the mean of -log p(event): windows overlap by half, and the half that is new counts."""
    total, number, half = 0.0, 0, context // (2 * len(VOICES)) * len(VOICES)
    for piece in pieces:
        line, done = piece.flatten(), 0
        while done < len(line):
            first = max(done - half, 0)
            tokens = torch.nn.functional.pad(line[first : first + context], (1, 0), value=START)
            losses = cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")[done - first :]
            total, number, done = total + float(losses.sum()), number + len(losses), first + context
    return total / number


def composed(model: LanguageModel, steps: int, seed: int) -> Tensor:
    """Let the model write: events (steps, 4), one at a time upon its cache."""
    draw = torch.Generator().manual_seed(seed)
    tokens = model.generate(torch.full((1, 1), START), steps * len(VOICES), top_p=0.95, generator=draw)
    # A start token in the middle, which training never showed, would be a rest.
    return (
        tokens[0, 1:]
        .unflatten(0, (steps, len(VOICES)))
        .masked_fill_(tokens[0, 1:].view(steps, -1) == START, REST)
    )


def written(events: Tensor, path: Path) -> bool:
    """Write a MIDI file and say whether music21 reads the same music from it."""
    write_score(events).write("midi", fp=str(path))
    again = read_score(music21().converter.parse(str(path)))
    return again is not None and sounding(again) == sounding(events)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--batch", type=int, default=8, help="windows of a step")
    parser.add_argument("--context", type=int, default=256, help="events of a window")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--pieces", type=int, help="only so many chorales; all by default")
    parser.add_argument(
        "--midi", type=Path, help="where the model's chorale goes; a temporary file by default"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice by default")
    parser.add_argument("--repeats", type=int, default=1, help="trainings, each from another seed")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    held, kept = chorales(options.pieces)[::-1]
    events = [sum(x.numel() for x in pieces) for pieces in (kept, held)]
    print(f"{fingerprint().sentence}; float32")
    print(
        f"{len(kept)} chorales of {events[0]:,} events to learn from, {len(held)} of {events[1]:,} held out"
    )
    grams = {"2-gram": (1,), "3-gram": (1, 2), "3-gram, with the voice's own last event": (1, len(VOICES))}
    counted = {name: Ngram(back, kept).nats(held) for name, back in grams.items()}
    for name, value in counted.items():
        print(f"{value:.4f} nats per event: {name}")
    found, seconds, model = [], [], None
    for seed in range(options.repeats):
        model = language_model(
            "music_transformer",
            vocab=VOCAB,
            context=options.context,
            dim=options.dim,
            heads=options.heads,
            depth=options.depth,
            positions=False,
            seed=seed,
        )
        began = time.process_time()
        train(model, kept, steps=options.steps, batch=options.batch, context=options.context, seed=seed)
        seconds.append(time.process_time() - began)
        found.append(nats(model.eval(), held, options.context))
    assert model is not None
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{statistics.median(found):.4f} nats per event: Music Transformer, {size:,} parameters, {options.steps} steps "
        f"of {options.batch} windows of {options.context} events"
        + (f"; {options.repeats} seeds: {min(found):.4f} to {max(found):.4f}" if options.repeats > 1 else "")
    )
    better = max(found) < min(counted.values())
    verdict = "better" if better else "NOT better"
    print(f"{verdict} than every n-gram; training took {statistics.median(seconds):.0f} s of processor time")
    with tempfile.TemporaryDirectory() as folder:
        path = options.midi or Path(folder) / "chorale.mid"
        piece = composed(model, options.context // len(VOICES), 0)
        same = written(piece, path)
    onsets = int((piece >= FIRST).sum())
    print(
        f"a chorale of {len(piece)} sixteenths and {onsets} notes, {'read back' if same else 'NOT read back'} from MIDI"
    )
    return int(not (better and same))


if __name__ == "__main__":
    sys.exit(main())
