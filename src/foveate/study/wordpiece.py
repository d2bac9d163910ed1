"""WordPiece, the tokenizer of BERT (arXiv 1810.04805): text -> ids, from the vocabulary of a model folder.

Text is lower-cased and freed of accents and control characters, cut at white space, punctuation and Chinese
characters, and every word is split greedily into the longest pieces of the vocabulary, `##` before all but the
first.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

from foveate.core.errors import bad

_LONGEST_WORD = 100
# Blocks of Chinese characters, each of which is a word of its own.
_CHINESE = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip


class WordPiece:
    """A tokenizer for uncased BERT vocabularies.

    Args:
        vocabulary: piece -> id; has `[CLS]`, `[SEP]` and `[UNK]`.

    Raises:
        ArgumentError: naming `vocabulary` when one of these is missing.
    """

    def __init__(self, vocabulary: dict[str, int]):
        for name in ("[CLS]", "[SEP]", "[UNK]"):
            if name not in vocabulary:
                raise bad("vocabulary", f"{len(vocabulary)} pieces", f"a BERT vocabulary, with {name}")
        self.vocabulary = vocabulary

    @classmethod
    def of_folder(cls, folder: str | Path) -> WordPiece:
        """Read `vocab.txt`, or the vocabulary in `tokenizer.json`.

        Raises:
            ArgumentError: if the folder has neither, or another kind of tokenizer, or a cased one.
        """
        listed, described = Path(folder) / "vocab.txt", Path(folder) / "tokenizer.json"
        if described.is_file():
            found = json.loads(described.read_text(encoding="utf-8"))
            if found["model"].get("type", "WordPiece") != "WordPiece":
                raise bad("model", str(folder), "a BERT model", f"Its tokenizer is {found['model']['type']}.")
            if not (found.get("normalizer") or {}).get("lowercase", True):
                raise bad("model", str(folder), "an uncased model", "This tokenizer lower-cases all text.")
            return cls(found["model"]["vocab"])
        if not listed.is_file():
            raise bad("model", str(folder), "a folder with vocab.txt or tokenizer.json")
        pieces = listed.read_text(encoding="utf-8").split("\n")
        return cls({piece: i for i, piece in enumerate(pieces) if piece})

    def encode(self, text: str, longest: int | None = None) -> list[int]:
        """Return the ids of `[CLS] text [SEP]`, the text cut so that they are at most `longest`."""
        ids = [self.vocabulary[piece] for word in words(text) for piece in self.pieces(word)]
        if longest is not None:
            ids = ids[: max(longest - 2, 0)]
        return [self.vocabulary["[CLS]"], *ids, self.vocabulary["[SEP]"]]

    def pieces(self, word: str) -> list[str]:
        """Split one word; `[UNK]` where no split exists."""
        found: list[str] = []
        start = 0
        while start < len(word):
            lead = "##" if start else ""
            stops = range(len(word), start, -1)
            stop = next((s for s in stops if lead + word[start:s] in self.vocabulary), None)
            if stop is None or len(word) > _LONGEST_WORD:
                return ["[UNK]"]
            found.append(lead + word[start:stop])
            start = stop
        return found


def words(text: str) -> list[str]:
    """Return the words and punctuation marks of a text, lower-cased, without accents."""
    cleaned = []
    for character in text:
        if character in "\t\n\r" or unicodedata.category(character) == "Zs":
            cleaned.append(" ")
        elif character == "\ufffd" or unicodedata.category(character).startswith("C"):
            continue
        else:
            cleaned.append(f" {character} " if _is_chinese(character) else character)
    plain = unicodedata.normalize("NFD", "".join(cleaned)).lower()
    plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
    return "".join(f" {c} " if _is_punctuation(c) else c for c in plain).split()


def _is_chinese(character: str) -> bool:
    return any(low <= ord(character) <= high for low, high in _CHINESE)


def _is_punctuation(character: str) -> bool:
    # All ASCII that is no letter, digit or space counts, `$` and `^` too.
    code = ord(character)
    ascii_mark = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_mark or unicodedata.category(character).startswith("P")
