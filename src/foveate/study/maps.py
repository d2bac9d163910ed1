"""Queries, keys and values to study: random ones, a safetensors file, and the form they are handed on in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad, need_extra
from foveate.core.grid import Grid


@dataclass(frozen=True)
class Maps:
    """Queries, keys and values of one attention layer.

    Attributes:
        name: the layer, or "".
        q: (B, H, N, D) queries, everything done to them that is done before the product.
        k: (B, H_kv, N, D) keys; H_kv divides H.
        v: (B, H_kv, N, D_v) values.
        scale: factor on q.k^T, D**-0.5 by default.
    """

    name: str
    q: Float[Tensor, "b h n d"]
    k: Float[Tensor, "b h_kv n d"]
    v: Float[Tensor, "b h_kv n d_v"]
    scale: float | None = None

    def __post_init__(self):
        for letter, x in (("q", self.q), ("k", self.k), ("v", self.v)):
            if not isinstance(x, Tensor) or x.ndim != 4 or not x.is_floating_point() or 0 in x.shape:
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise bad(letter, got, "a floating point tensor (B, H, N, D) with no size 0")
            if (x.shape[0], x.shape[2]) != (self.q.shape[0], self.q.shape[2]):
                raise bad(letter, tuple(x.shape), f"batch and tokens of q, {tuple(self.q.shape)}")
        if self.k.shape[3] != self.q.shape[3]:
            raise bad("k", tuple(self.k.shape), f"channels of q, {self.q.shape[3]}")
        if self.k.shape[1] != self.v.shape[1] or self.q.shape[1] % self.k.shape[1]:
            raise bad(
                "k, v", (self.k.shape[1], self.v.shape[1]), "one number of heads that divides that of q"
            )

    @property
    def n(self) -> int:
        """Number of tokens."""
        return self.q.shape[2]

    def spread(self) -> Maps:
        """Return the same in float32, with as many key and value heads as query heads and the default scale.

        Another scale is multiplied into q, so that routers, which see q and k alone, see the logits' sizes.
        """
        times, q = self.q.shape[1] // self.k.shape[1], self.q.float()
        if self.scale is not None:
            q = q * (self.scale * q.shape[3] ** 0.5)
        k, v = (x.float().repeat_interleave(times, dim=1) for x in (self.k, self.v))
        return Maps(self.name, q, k, v)


def random_maps(n: int, *, heads: int = 2, head_dim: int = 64, seed: int = 0) -> list[Maps]:
    """Return independent standard normal q, k and v: attention without any structure to find.

    Raises:
        ArgumentError: naming the size that is not positive.
    """
    for name, value in (("n", n), ("heads", heads), ("head_dim", head_dim)):
        if value < 1:
            raise bad(name, value, "a positive integer")
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, n, head_dim, generator=generator) for _ in range(3))
    return [Maps("", q, k, v)]


def load_maps(path: str | Path) -> tuple[list[Maps], dict[str, Any]]:
    """Read q, k and v from a safetensors file.

    The tensors are named `q`, `k`, `v`, or `<layer>.q`, `<layer>.k`, `<layer>.v` for several layers; each is
    (H, N, D) or (B, H, N, D). The file's metadata may say `scale` (a number), `causal` ("true" or "false") and
    `grid` (such as "64x64").

    Returns:
        The layers in the order of their names (numbers in names count as numbers), and what the metadata says.

    Raises:
        MissingExtraError: if safetensors is not installed.
        ArgumentError: naming the file, tensor or entry that cannot be used.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise need_extra("safetensors", "study") from None
    if not Path(path).is_file():
        raise bad("file", str(path), "a safetensors file with q, k and v")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise bad(
            "file", str(path), "a safetensors file with q, k and v", f"Reading it says: {error}."
        ) from None
    said = _metadata(metadata)
    layers = sorted({name.rpartition(".")[0] for name in tensors if _letter(name) in "qkv"}, key=_natural)
    if not layers:
        hint = "Name them q, k, v, or <layer>.q, <layer>.k, <layer>.v."
        raise bad("file", sorted(tensors)[:6], "tensors q, k and v", hint)
    return [_layer(tensors, layer, said.get("scale")) for layer in layers], said


def _layer(tensors: Mapping[str, Tensor], layer: str, scale: float | None) -> Maps:
    found = []
    for letter in "qkv":
        name = f"{layer}.{letter}" if layer else letter
        if name not in tensors:
            raise bad("file", sorted(n for n in tensors if n.rpartition(".")[0] == layer), f"also {name!r}")
        x = tensors[name]
        found.append(x[None] if x.ndim == 3 else x)
    return Maps(layer, *found, scale=scale)


def _metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    try:
        if "scale" in metadata:
            said["scale"] = float(metadata["scale"])
        if "causal" in metadata:
            said["causal"] = {"true": True, "false": False}[metadata["causal"].lower()]
        if "grid" in metadata:
            said["grid"] = Grid(*(int(part) for part in metadata["grid"].split("x")))
    except (ValueError, KeyError) as error:
        hint = f"scale is a number, causal is true or false, grid is like 64x64 ({error})."
        raise bad("file", dict(metadata), "metadata that can be read", hint) from None
    return said


def _letter(name: str) -> str:
    last = name.rpartition(".")[2]
    return last if len(last) == 1 else "-"


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorting key in which layer.10 comes after layer.9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]
