"""The decoder-only language model: causal layers between an embedding and a head, and sampling from them.

    x = embed(tokens) * embed_scale (+ position)      (B, N, C)
    x = layer(x)                                      depth times
    logits = head(norm(x))                            (B, N, vocab)

Decoding keeps a value per layer, `Caches`: a state of constant size where the mechanism scans, keys and values where
it attends. A mechanism with neither can be sampled from too, by evaluating the whole sequence for every token; that
is never done unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foveate.core.errors import UnsupportedError, bad
from foveate.core.grid import Grid
from foveate.kernels.scan.contract import seen
from foveate.models.backbone import Block, sine_positions
from foveate.models.sampling import check_sampling, draw_token


class Caches(NamedTuple):
    """What decoding keeps: every layer's past, and how many tokens came before."""

    layers: tuple[Any, ...]
    length: int


class DecoderLayer(Block):
    """A pre-norm residual block around a causal token mixer, for training and decoding.

    Args:
        mixer: `forward(x, grid)`, and for decoding `prefill(x, past)` and `step(x, past)`.
        dim: channels C.
        mlp_ratio: width of the MLP over `dim`.
    """

    def __init__(self, mixer: nn.Module, *, dim: int, mlp_ratio: float = 4.0):
        super().__init__(dim=dim, mlp_ratio=mlp_ratio)
        self.mixer = mixer

    def prefill(self, x: Float[Tensor, "b n c"], past: Any = None) -> tuple[Float[Tensor, "b n c"], Any]:
        """Apply the layer to tokens that follow `past`.

        Raises:
            UnsupportedError: the mixer can only start with several tokens at once, not go on with them.
        """
        mixer: Any = self.mixer
        if past is not None and len(signature(mixer.prefill).parameters) < 2:
            raise UnsupportedError(
                f"{type(mixer).__name__}.prefill takes no past: hand all tokens over at once, then use step"
            )
        mixed, past = mixer.prefill(self.norm_mixer(x), *(() if past is None else (past,)))
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), past

    def step(self, x: Float[Tensor, "b c"], past: Any = None) -> tuple[Float[Tensor, "b c"], Any]:
        """Apply the layer to one token."""
        mixer: Any = self.mixer
        mixed, past = mixer.step(self.norm_mixer(x), past)
        x = x + mixed
        return x + self.mlp(self.norm_mlp(x)), past


class LanguageModel(nn.Module):
    """Tokens in, logits of the next token out.

    Args:
        vocab: number of different tokens.
        dim: channels C.
        layers: causal layers `forward(x (B, N, C), grid)`; those with `prefill` and `step` can be decoded.
        norm: before the head; LayerNorm by default.
        context: number of tokens the layers were built for, None if they do not care.
        positions: whether every token of `context` has a learned position, starting from sines and cosines; longer
            sequences are refused then.
        tied: whether the head reads with the embedding's weights.
        embed_scale: factor on the embeddings.
        init_std: of the embedding's and the head's initial weights.

    Raises:
        ArgumentError: naming the argument that does not fit.
    """

    def __init__(
        self,
        *,
        vocab: int,
        dim: int,
        layers: Iterable[nn.Module],
        norm: nn.Module | None = None,
        context: int | None = None,
        positions: bool = False,
        tied: bool = False,
        embed_scale: float = 1.0,
        init_std: float = 0.02,
    ):
        super().__init__()
        for name, value in {"vocab": vocab, "dim": dim, "context": context}.items():
            if value is not None and value < 1:
                raise bad(name, value, "a positive integer")
        if positions and context is None:
            raise bad("context", None, "a number of tokens when there are positions")
        self.vocab, self.dim, self.context, self.embed_scale = vocab, dim, context, embed_scale
        self.embed = nn.Embedding(vocab, dim)
        nn.init.normal_(self.embed.weight, std=init_std)
        self.position = None
        if positions and context is not None:
            self.position = nn.Parameter(sine_positions(Grid(context), dim) * init_std * embed_scale)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim) if norm is None else norm
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        else:
            nn.init.normal_(self.head.weight, std=init_std)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Return the logits of the token after each.

        Raises:
            ArgumentError: naming `tokens`.
        """
        return self.head(self.norm(self._whole(tokens)))

    def prefill(
        self, tokens: Int[Tensor, "b n"], caches: Caches | None = None
    ) -> tuple[Float[Tensor, "b n v"], Caches]:
        """Return the logits of tokens that follow what `caches` has seen, and the new caches.

        Raises:
            ArgumentError: naming `tokens` or `caches`.
            UnsupportedError: a layer cannot be decoded; see `generate`.
        """
        x, caches = self._follow(tokens, caches)
        return self.head(self.norm(x)), caches

    def step(
        self, token: Int[Tensor, "b"], caches: Caches | None = None
    ) -> tuple[Float[Tensor, "b v"], Caches]:
        """Return the logits after one more token per row, and the new caches; raises as `prefill` does."""
        if token.ndim != 1:
            raise bad("token", tuple(token.shape), "(batch,), one token per row")
        x, caches = self._follow(token.unsqueeze(1), caches)
        return self.head(self.norm(x.squeeze(1))), caches

    def undecodable(self) -> dict[int, str]:
        """Return {layer: class name of its mixer} for layers without `prefill` and `step`."""
        mixers = [getattr(layer, "mixer", layer) for layer in self.layers]
        return {
            i: type(mixer).__name__
            for i, mixer in enumerate(mixers)
            if not (callable(getattr(mixer, "prefill", None)) and callable(getattr(mixer, "step", None)))
        }

    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "b n"],
        count: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        stop: int | None = None,
        method: Literal["steps", "whole"] = "steps",
    ) -> Int[Tensor, "b m"]:
        """Continue sequences by `count` sampled tokens.

        Args:
            tokens: (B, N) prompts of one length, N >= 1.
            count: tokens to add.
            temperature, top_k, top_p, generator: as in `draw_token`.
            stop: a token that ends a row, which is then filled up with it; the result is shorter when all rows end.
            method: "steps" evaluates each token once, upon the caches. "whole" evaluates the sequence anew for
                every token, filled up behind its end to `context` where there is one: slower by as many times as
                there are tokens, but every causal layer can do it.

        Returns:
            (B, N + count), the prompts included.

        Raises:
            ArgumentError: naming the argument that does not fit, or `count` when the context does not suffice.
            UnsupportedError: a layer has no `prefill` and `step`, and `method` is "steps".
        """
        check_sampling(temperature, top_k, top_p)
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise bad("count", count, "a number of tokens")
        if method not in ("steps", "whole"):
            raise bad("method", method, "'steps' or 'whole'")
        self._check(tokens, 0)
        bounded = self.position is not None or method == "whole"
        # The last token is drawn, never read.
        if bounded and self.context is not None and tokens.shape[1] + count - 1 > self.context:
            room = self.context + 1 - tokens.shape[1]
            raise bad("count", count, f"at most {room}: the context has {self.context} tokens")
        caches, new = None, tokens
        ended = torch.zeros_like(tokens[:, 0], dtype=torch.bool)
        for _ in range(count):
            if method == "steps":
                x, caches = self._follow(new, caches)
                x = x[:, -1]
            else:
                x = self._whole(self._filled(tokens))[:, tokens.shape[1] - 1]
            logits = self.head(self.norm(x))
            drawn = draw_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            if stop is not None:
                drawn = drawn.masked_fill(ended, stop)
                ended = ended | (drawn == stop)
            new = drawn.unsqueeze(1)
            tokens = torch.cat([tokens, new], dim=1)
            if stop is not None and bool(ended.all()):
                break
        return tokens

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 1 or tokens.is_floating_point():
            raise bad(
                "tokens", f"{tokens.dtype} {tuple(tokens.shape)}", "integers (batch, at least one token)"
            )
        if seen((tokens < 0) | (tokens >= self.vocab)):
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab)]
            raise bad("tokens", int(wrong[0]), f"ids from 0 to {self.vocab - 1}")
        if self.position is not None and start + tokens.shape[1] > len(self.position):
            room = f"at most {len(self.position)} tokens in all, one per position"
            raise bad("tokens", start + tokens.shape[1], room)

    def _embedded(self, tokens: Tensor, start: int) -> Float[Tensor, "b n c"]:
        self._check(tokens, start)
        x = self.embed(tokens) * self.embed_scale
        return x if self.position is None else x + self.position[start : start + tokens.shape[1]]

    def _whole(self, tokens: Tensor) -> Float[Tensor, "b n c"]:
        x = self._embedded(tokens, 0)
        grid = Grid(tokens.shape[1])
        for layer in self.layers:
            x = layer(x, grid)
        return x

    def _filled(self, tokens: Tensor) -> Tensor:
        # What stands behind the end is seen by nobody; layers made for one length get that length.
        missing = 0 if self.context is None else self.context - tokens.shape[1]
        return nn.functional.pad(tokens, (0, missing))

    def _follow(self, tokens: Tensor, caches: Caches | None) -> tuple[Float[Tensor, "b n c"], Caches]:
        missing = self.undecodable()
        if missing:
            listed = ", ".join(f"{i} ({name})" for i, name in missing.items())
            raise UnsupportedError(
                f"layers without prefill and step cannot go on from a cache: {listed}. "
                "generate(..., method='whole') evaluates the whole sequence for every token instead"
            )
        if caches is not None and len(caches.layers) != len(self.layers):
            raise bad(
                "caches", f"{len(caches.layers)} layers", f"{len(self.layers)} layers, as the model has"
            )
        start = 0 if caches is None else caches.length
        pasts: Sequence[Any] = [None] * len(self.layers) if caches is None else caches.layers
        x = self._embedded(tokens, start)
        new = []
        for layer, past in zip(self.layers, pasts, strict=True):
            part: Any = layer
            if tokens.shape[1] == 1 and past is not None:
                out, past = part.step(x.squeeze(1), past)
                x = out.unsqueeze(1)
            else:
                x, past = part.prefill(x, *(() if past is None else (past,)))
            new.append(past)
        return x, Caches(tuple(new), start + tokens.shape[1])
