"""One golden file as an adapter sees it: metadata, tensors, and a record of what was used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

# The first words of tensor names that say what the tensor is.
GIVEN = ("in", "param", "aux", "buffer")
REFERENCE = ("out", "grad", "mask", "init")
SEED = "cotangent"
KINDS = (*GIVEN, *REFERENCE, SEED)


@dataclass
class Vector:
    """The tensors of one case of one golden file.

    Everything an adapter takes is recorded, so that the runner can tell what was left over.
    `input` and `param` return leaves that collect gradients; the runner compares these itself.

    Attributes:
        key: the system.
        part: the part of it this file covers; "" when the file name has none.
        case: name of the case inside the file; "" when there is only one.
        config: options of the authors' code for this case.
        call, notes: how the authors' code was called, as prose.
        tensors: name -> tensor, the case's name taken out.
    """

    key: str
    part: str
    case: str
    config: dict[str, Any]
    call: str
    notes: str
    tensors: dict[str, Tensor]
    leaves: dict[str, Tensor] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    seeds: dict[str, str] = field(default_factory=dict)
    loads: list[tuple[Tensor, nn.Parameter]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`key.part[case]`, as messages and the ledger name it."""
        stem = f"{self.key}.{self.part}" if self.part else self.key
        return f"{stem}[{self.case}]" if self.case else stem

    def has(self, name: str) -> bool:
        """Whether the file holds the tensor with this full name."""
        return name in self.tensors

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of one kind, without the kind: `names("in")` -> ["k", "q", "v"]."""
        return sorted(n.removeprefix(kind + ".") for n in self.tensors if n.startswith(kind + "."))

    def take(self, name: str) -> Tensor:
        """Return any tensor by its full name, as it is, and mark it used."""
        if name not in self.tensors:
            raise KeyError(f"{self.name} has no tensor {name!r}; it has {sorted(self.tensors)}")
        self.used.add(name)
        return self.tensors[name]

    def leaf(self, name: str) -> Tensor:
        """Return a tensor by its full name as a leaf of the graph (floats only), and mark it used."""
        if name not in self.leaves:
            value = self.take(name).clone()
            self.leaves[name] = value.requires_grad_(value.is_floating_point())
        return self.leaves[name]

    def input(self, name: str) -> Tensor:
        """Return `in.<name>`; its gradient is compared with `grad.in.<name>` where the file has it."""
        return self.leaf(f"in.{name}")

    def inputs(self) -> dict[str, Tensor]:
        """Return all inputs by name."""
        return {name: self.input(name) for name in self.names("in")}

    def param(self, name: str) -> Tensor:
        """Return `param.<name>`; its gradient is compared with `grad.param.<name>` where the file has it."""
        return self.leaf(f"param.{name}")

    def aux(self, name: str) -> Tensor:
        """Return `aux.<name>`: a stored random draw or helper table."""
        return self.take(f"aux.{name}")

    def seed(self, cotangent: str | None, output: str) -> None:
        """Say which output a cotangent belongs to, where the names do not (`None`: a cotangent of ones)."""
        self.seeds[output] = cotangent or ""

    def load(
        self,
        module: nn.Module,
        *,
        prefix: str = "",
        rename: Mapping[str, str] | None = None,
        given: Mapping[str, Tensor] | None = None,
        keep: tuple[str, ...] = (),
    ) -> None:
        """Fill every entry of `module.state_dict()` from `param.*`; anything left over is an error.

        Args:
            module: our module.
            prefix: dotted start of the official names, taken off first ("attn." or "").
            rename: official name or dotted beginning of one -> ours; the longest match wins.
            given: our name -> tensor made from `vector.param(...)` by reshaping, permuting, slicing.
            keep: our entries that the authors' code does not have.
        """
        rename, given = dict(rename or {}), dict(given or {})
        ours = module.state_dict(keep_vars=True)
        source: dict[str, Tensor] = dict(given)
        for official in self.names("param"):
            full = f"param.{official}"
            if not official.startswith(prefix):
                continue
            mapped = _renamed(official.removeprefix(prefix), rename)
            if mapped in ours and mapped not in source:
                source[mapped] = self.leaf(full)
        missing = sorted(set(ours) - set(source) - set(keep))
        extra = sorted(set(source) - set(ours))
        if missing or extra:
            raise KeyError(
                f"{self.name}: nothing loads into {missing}; no place for {extra}; "
                f"unused: {sorted(n for n in self.names('param') if 'param.' + n not in self.used)}"
            )
        for name, tensor in source.items():
            target = ours[name]
            if target.shape != tensor.shape:
                raise ValueError(
                    f"{self.name}: {name} is {tuple(target.shape)}, loaded {tuple(tensor.shape)}"
                )
            with torch.no_grad():
                target.copy_(tensor)
            if isinstance(target, nn.Parameter) and tensor.requires_grad:
                self.loads.append((tensor, target))


def _renamed(name: str, rename: Mapping[str, str]) -> str:
    for old in sorted(rename, key=len, reverse=True):
        stem = old.rstrip(".")
        if name == stem or name.startswith(stem + ".") or (not stem):
            tail = name[len(stem) :].lstrip(".")
            return ".".join(p for p in (rename[old].rstrip("."), tail) if p)
    return name


def read(path: Path) -> list[Vector]:
    """Read a golden file and split it into its cases."""
    key, _, part = path.name.removesuffix(".safetensors").partition(".")
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    config = json.loads(metadata.get("config") or "{}")
    texts = {"call": metadata.get("call", ""), "notes": metadata.get("notes", "")}
    return [
        Vector(key=key, part=part, case=case, config=options, tensors=own, **texts)
        for case, options, own in _split(config, tensors)
    ]


def _split(config: dict, tensors: dict[str, Tensor]) -> Iterator[tuple[str, dict, dict[str, Tensor]]]:
    """Yield the cases of a file: those whose configuration and every tensor name carry a case name."""
    if config and all(isinstance(options, dict) for options in config.values()):
        parts = {name: _case_of(name, config) for name in tensors}
        if all(case is not None for case, _ in parts.values()):
            for case, options in config.items():
                own = {bare: tensors[name] for name, (c, bare) in parts.items() if c == case}
                if own:
                    yield case, options, own
            return
    yield "", config, tensors


def _case_of(name: str, cases: Mapping[str, Any]) -> tuple[str | None, str]:
    """Split `<kind>.<case>.<arg>`, `grad.<kind>.<case>.<arg>` or `<case>.<kind>.<arg>` into case and rest."""
    for case in sorted(cases, key=len, reverse=True):
        if name.startswith(case + "."):
            return case, name[len(case) + 1 :]
        head, middle, tail = name.partition(f".{case}")
        if middle and all(word in KINDS for word in head.split(".")) and (not tail or tail[0] == "."):
            return case, head + tail
    return None, name
