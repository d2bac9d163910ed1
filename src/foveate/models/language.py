"""Language models to build: around any registered causal mechanism, and TransNormerLLM.

model = language_model("lightning_attention", vocab=128, context=512)
logits = model(tokens)                                    # (B, N, vocab), for training
logits, caches = model.prefill(tokens)                    # the same, and what decoding keeps
logits, caches = model.step(token, caches)                # (B, vocab)
tokens = model.generate(tokens, 100, temperature=0.8, top_p=0.9)
"""

from __future__ import annotations

import math

import torch
from torch import nn

from foveate.core.grid import Grid
from foveate.mechanisms.linear.transnormer_llm import TransNormerLayer
from foveate.mechanisms.norms import SimpleRMSNorm
from foveate.models.backbone import MixerFactory, build_mixer
from foveate.models.decoder import Caches as Caches
from foveate.models.decoder import DecoderLayer as DecoderLayer
from foveate.models.decoder import LanguageModel as LanguageModel


def language_model(
    mechanism: str | MixerFactory,
    *,
    vocab: int,
    context: int,
    dim: int = 256,
    heads: int = 4,
    depth: int = 4,
    mlp_ratio: float = 4.0,
    positions: bool = True,
    tied: bool = True,
    seed: int = 0,
) -> LanguageModel:
    """Build a language model around a registered causal mechanism.

    Args:
        mechanism: its key, or a function that makes a mixer from `dim=, grid=, heads=, causal=`.
        vocab, context, positions, tied: as in `LanguageModel`.
        dim, heads, depth: width, heads and number of layers.
        mlp_ratio: width of the MLPs over `dim`.
        seed: fixes the initial numbers; the caller's random state stays as it is.

    Raises:
        UnknownNameError: no such mechanism.
        ArgumentError, UnsupportedError: it cannot be causal or serve this width or context, for the reason said.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        where = {"dim": dim, "grid": Grid(context), "heads": heads, "causal": True}
        if isinstance(mechanism, str):
            mixers = [build_mixer(mechanism, layer=i, layers=depth, **where) for i in range(depth)]
        else:
            mixers = [mechanism(**where) for _ in range(depth)]
        return LanguageModel(
            vocab=vocab,
            dim=dim,
            layers=[DecoderLayer(mixer, dim=dim, mlp_ratio=mlp_ratio) for mixer in mixers],
            context=context,
            positions=positions,
            tied=tied,
            # Embeddings of the size of what layers add to them, and small logits also from a tied head.
            embed_scale=math.sqrt(dim),
            init_std=0.5 / math.sqrt(dim),
        )


def transnormer_llm(
    *,
    vocab: int = 64000,
    dim: int = 1024,
    heads: int = 8,
    depth: int = 24,
    hidden: int = 2816,
    width: int | None = None,
    chunk: int = 64,
    seed: int = 0,
) -> LanguageModel:
    """Build TransNormerLLM (arXiv 2307.14995): decoding keeps a constant state, sequences have no longest length.

    The defaults are those of the authors' configuration class. Distances are encoded in the first layer only,
    embeddings are scaled by sqrt(dim), the head is not tied, no map has a bias, all weights start from N(0, 0.02^2).

    Args:
        vocab: number of different tokens.
        dim: channels.
        heads: per layer.
        depth: layers.
        hidden: channels inside the gated units.
        width: channels of all heads together; `dim` by default.
        chunk: tokens per chunk of the scan in training.
        seed: fixes the initial numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            TransNormerLayer(
                dim=dim,
                heads=heads,
                width=width,
                hidden=hidden,
                lrpe=i == 0,
                layer=i,
                layers=depth,
                chunk=chunk,
            )
            for i in range(depth)
        ]
        model = LanguageModel(
            vocab=vocab, dim=dim, layers=layers, norm=SimpleRMSNorm(dim), embed_scale=math.sqrt(dim)
        )
        for part in model.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02)
    return model
