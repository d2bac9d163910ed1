"""`text`: predict the next character of the standard library's documentation, or of one's own file.

Causal. Scored in bits per character on text of other topics than the trained ones; the trivial answers
are character frequencies alone and given the character before (unigram, bigram).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad
from foveate.core.grid import Grid
from foveate.models.backbone import NetSpec
from foveate.tasks.workload import Batch, Recipe, Workload, generator_for

UNKNOWN = 0  # id of characters that the training text does not have
ROOM = 128  # ids at most, so that the network's size does not depend on the text


@cache
def documentation() -> tuple[str, str]:
    """Return the standard library's help topics as (train, test): every eighth topic is held out.

    Raises:
        ArgumentError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise bad(
            "file", None, "a text file", "This Python has no pydoc topics; name a text file instead."
        ) from error
    ordered = [topics[name] for name in sorted(topics)]
    test = ordered[4::8]
    train = [text for i, text in enumerate(ordered) if i % 8 != 4]
    return "\n".join(train), "\n".join(test)


def encode(train: str, test: str) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"], int]:
    """Number the characters by their frequency in `train`; rare and new ones share the id 0.

    Returns:
        ids of both texts, and the number of ids in use (id 0 included).
    """
    counts: dict[str, int] = {}
    for char in train:
        counts[char] = counts.get(char, 0) + 1
    kept = sorted(counts, key=lambda c: (-counts[c], c))[: ROOM - 1]
    table = {char: i + 1 for i, char in enumerate(kept)}
    ids = [torch.tensor([table.get(c, UNKNOWN) for c in text], dtype=torch.long) for text in (train, test)]
    return ids[0], ids[1], len(kept) + 1


class TextWorkload(Workload):
    """Character language model. Targets (B, N): the character after each.

    Args:
        length: characters per example, N.
        file: a text file (UTF-8) instead of the documentation; its last tenth is held out.
        test_size: held-out windows of N characters.
        dim, heads, depth: size of the network.

    Raises:
        ArgumentError: a value that cannot work, or a file that is missing, not text, or too short.
    """

    key = "text"
    title = "text, character by character: what comes next?"
    metric = "bits per character"
    higher_is_better = False

    def __init__(
        self,
        *,
        length: int = 512,
        file: str | Path | None = None,
        test_size: int = 48,
        dim: int = 64,
        heads: int = 4,
        depth: int = 2,
    ):
        if length < 8:
            raise bad("length", length, "at least 8 characters")
        if test_size < 2:
            raise bad("test_size", test_size, "at least 2 windows")
        if file is not None and not Path(file).is_file():
            raise bad("file", str(file), "an existing text file")
        self.length, self.file, self.test_size = length, None if file is None else str(file), test_size
        self.spec = NetSpec(
            inputs="ids",
            grid=Grid(length),
            in_features=ROOM,
            out_features=ROOM,
            dim=dim,
            heads=heads,
            depth=depth,
            causal=True,
        )
        self.recipe = Recipe(batch_size=16, lr=5e-3)
        self._text: tuple[Tensor, Tensor, int] | None = None
        self._counted: tuple[Tensor, Tensor] | None = None

    def options(self) -> dict[str, Any]:
        """Return the options that make this instance."""
        return {
            "length": self.length,
            "file": self.file,
            "test_size": self.test_size,
            "dim": self.spec.dim,
            "heads": self.spec.heads,
            "depth": self.spec.depth,
        }

    def ids(self) -> tuple[Int[Tensor, "n"], Int[Tensor, "m"], int]:
        """Return training ids, held-out ids and the number of ids in use."""
        if self._text is None:
            train, test = documentation() if self.file is None else self._own(self.file)
            self._text = encode(train, test)
        return self._text

    def _own(self, path: str) -> tuple[str, str]:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise bad("file", path, "a text file in UTF-8", f"Reading it says: {error}") from error
        cut = len(text) - len(text) // 10
        if len(text) - cut < 2 * (self.length + 1):
            raise bad(
                "file",
                path,
                f"a text of at least {20 * (self.length + 1)} characters",
                f"It has {len(text)}.",
            )
        return text[:cut], text[cut:]

    def _windows(self, ids: Tensor, starts: Tensor) -> Batch:
        window = ids[starts[:, None] + torch.arange(self.length + 1)]
        return Batch(window[:, :-1], window[:, 1:])

    def batch(self, step: int, *, seed: int = 0, size: int | None = None) -> Batch:
        """Return windows at random places of the training text."""
        ids = self.ids()[0]
        n = size or self.recipe.batch_size
        return self._windows(
            ids, torch.randint(len(ids) - self.length, (n,), generator=generator_for(seed, step))
        )

    def test_batches(self, size: int) -> Iterator[Batch]:
        """Yield windows spread evenly over the held-out text."""
        ids = self.ids()[1]
        most = min(self.test_size, max(2, len(ids) // (self.length + 1)))
        starts = torch.linspace(0, len(ids) - self.length - 1, most).long()
        for part in starts.split(size):
            yield self._windows(ids, part)

    def loss(self, output: Float[Tensor, "b n out"], batch: Batch) -> Tensor:
        """Cross-entropy of the next character, in nats."""
        return F.cross_entropy(output.flatten(0, 1), batch.targets.flatten())

    def scores(self, output: Float[Tensor, "b n out"], batch: Batch) -> dict[str, Tensor]:
        """Bits per character of every window, and of its last quarter, where the context is long."""
        nats = F.cross_entropy(output.transpose(1, 2), batch.targets, reduction="none")
        bits = nats / math.log(2)
        return {"quality": bits.mean(1), "last quarter": bits[:, -self.length // 4 :].mean(1)}

    def _tables(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of characters, alone (ids,) and after one character (ids, ids).

        Add-one smoothing for single characters; pairs fall back on them with the weight of one sighting.
        """
        if self._counted is None:
            train, _, used = self.ids()
            single = torch.bincount(train, minlength=ROOM).double()
            single[:used] += 1
            single = single / single.sum()
            pairs = torch.zeros(ROOM, ROOM, dtype=torch.double)
            pairs.index_put_((train[:-1], train[1:]), torch.ones((), dtype=torch.double), accumulate=True)
            pairs = (pairs + single) / (pairs.sum(1, keepdim=True) + 1.0)
            floor = torch.finfo(torch.float32).tiny
            self._counted = single.clamp_min(floor).log(), pairs.clamp_min(floor).log()
        return self._counted

    def reference(self, batch: Batch) -> Float[Tensor, "b"]:
        """Bits per character of the bigram table on every window."""
        return self.scores(self._tables()[1][batch.inputs].float(), batch)["quality"]

    def trivial(self) -> dict[str, float]:
        """Bits per character of frequencies counted on the training text, alone and after one character."""
        single, pairs = self._tables()
        return {
            "unigram": self.evaluate(lambda x: single.expand(*x.shape, ROOM)).quality,
            "bigram": self.evaluate(lambda x: pairs[x]).quality,
        }
