"""The C++ core as a shared library: its structs, where it is, why it is not there, and which instruction set runs.

The core is linked neither to torch nor to Python. ctypes passes it plain pointers and releases the interpreter
lock while it works. `core/foveate_cpu.h` is the contract; the structs below repeat it field by field, and the
version number at its top guards them.
"""

from __future__ import annotations

import contextvars
import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from foveate.core.errors import UnsupportedError, unknown

ABI = 4
MAX_TERMS = 4
# The values of the FV_* enumerations of the header.
F32, BF16, F16 = 0, 1, 2
SOFTMAX, SIGMOID = 0, 1
ISA_NAMES = ("portable", "AVX2", "AVX-512", "AVX-512 BF16", "AMX BF16")
FORWARD, BACKWARD_QUERY, BACKWARD_KEY = "fv_forward", "fv_backward_query", "fv_backward_key"
FLATTEN, TRANSPOSE = "fv_flatten", "fv_transpose"
SCAN_FORWARD, SCAN_BACKWARD = "fv_scan_forward", "fv_scan_backward"
_FAILURES = {
    1: "the core was built for another version of this package; install foveate again",
    2: "the core was asked for instructions this CPU does not have",
    3: "there is no memory left for the core's work space",
}
# What the build leaves beside the package when it could not make the core.
REASON_FILE = "not_built.txt"


class TensorArg(Structure):
    """`fv_tensor`: a (B, H, N, D) tensor with a contiguous last dimension; strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("stride_b", c_int64),
        ("stride_h", c_int64),
        ("stride_n", c_int64),
    )


class CellsArg(Structure):
    """`fv_cells`: flattened cells, see `flatten.py`."""

    _fields_ = (
        ("set_ptr", c_void_p),
        ("set_stride_b", c_int64),
        ("set_stride_h", c_int64),
        ("own_ptr", c_void_p),
        ("own", c_void_p),
        ("run_ptr", c_void_p),
        ("runs", c_void_p),
        ("mask_ptr", c_void_p),
        ("masks", c_void_p),
    )


class IdsArg(Structure):
    """`fv_ids`: cells that list their ids; strides in elements, 0 where shared."""

    _fields_ = (
        ("own", c_void_p),
        ("other", c_void_p),
        ("mask", c_void_p),
        ("own_stride", c_int64 * 4),
        ("other_stride", c_int64 * 4),
        ("mask_stride", c_int64 * 5),
        ("cells", c_int64),
        ("n_own", c_int64),
        ("n_other", c_int64),
    )


class TermArg(Structure):
    """`fv_term`: bias[b, h, q, k] = table[b, h, clamp(q_code[q] + k_code[k] + base)]."""

    _fields_ = (
        ("table", c_void_p),
        ("grad", c_void_p),
        ("stride_b", c_int64),
        ("stride_h", c_int64),
        ("grad_stride_b", c_int64),
        ("grad_stride_h", c_int64),
        ("grad_stride_slice", c_int64),
        ("size", c_int64),
        ("q_code", c_void_p),
        ("k_code", c_void_p),
        ("base", c_int64),
    )


class Job(Structure):
    """`fv_job`: one call."""

    _fields_ = (
        *((name, c_int32) for name in ("abi", "dtype", "rule", "isa", "threads", "n_terms")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "n_q", "n_k", "dim", "dim_v")),
        *((name, c_float) for name in ("scale", "softcap", "sigmoid_bias")),
        *((name, TensorArg) for name in ("q", "k", "v", "out")),
        ("row_factor", c_void_p),
        ("row_factor_stride_b", c_int64),
        ("row_factor_stride_h", c_int64),
        ("sink", c_void_p),
        ("lse", c_void_p),
        ("terms", TermArg * MAX_TERMS),
        ("by_query", CellsArg),
        ("by_key", CellsArg),
        *((name, TensorArg) for name in ("d_out", "d_q", "d_k", "d_v")),
        ("delta", c_void_p),
        ("d_row_factor", c_void_p),
        ("slices", c_int64),
        ("parallel", c_void_p),
        ("finish_delta", c_int64),
    )


@dataclass(frozen=True)
class Library:
    """The loaded core.

    Attributes:
        handle: the ctypes library.
        best_isa: the fastest instruction set this CPU has, an index into ISA_NAMES.
        parallel: address of `GOMP_parallel` in the OpenMP runtime that torch brought, None where there is none.
    """

    handle: ctypes.CDLL
    best_isa: int
    parallel: int | None

    def launch(self, which: str, job: Any) -> None:
        """Run a `Job`, or the struct of a scan.

        Raises:
            UnsupportedError: if the core refuses the job.
        """
        job.abi, job.parallel = ABI, self.parallel
        code = getattr(self.handle, which)(ctypes.byref(job))
        if code:
            raise UnsupportedError(f"backend 'cpu': {_FAILURES.get(code, f'the core returned {code}')}.")

    def make(self, which: str, *arguments) -> tuple[int | None, tuple[int, ...]]:
        """Make flat cells: a handle for `fv_flat_take` (None: it failed), and the sizes the header tells of."""
        sizes = (c_int64 * 6)()
        return getattr(self.handle, which)(*arguments, sizes), tuple(sizes)


def library_path() -> Path:
    """Return where the core is when it was built: beside this module."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return Path(__file__).with_name(f"libfoveate_cpu.{suffix}")


def _stored_reason() -> str:
    """Return what the build wrote when it left the core out.

    An editable install keeps that file in site-packages, so every directory of the package is looked at; a library
    that an earlier build left beside the sources then does not count.
    """
    for directory in sys.modules[__name__.rpartition(".")[0]].__path__:
        stored = Path(directory, REASON_FILE)
        if stored.exists():
            return stored.read_text(encoding="utf-8").strip()
    return ""


@cache
def _load() -> Library | str:
    """Load the core once; the text says why it is not there."""
    if os.environ.get("FOVEATE_NO_NATIVE") == "1":
        return "the C++ core is switched off by FOVEATE_NO_NATIVE=1"
    path = library_path()
    reason = _stored_reason()
    if reason or not path.exists():
        return "the C++ core was not built" + (f" ({reason})" if reason else "")
    try:
        handle = ctypes.CDLL(str(path))
        for which in (FORWARD, BACKWARD_QUERY, BACKWARD_KEY):
            function = getattr(handle, which)
            function.argtypes, function.restype = (POINTER(Job),), c_int
        for which in (SCAN_FORWARD, SCAN_BACKWARD):
            function = getattr(handle, which)
            function.argtypes, function.restype = (c_void_p,), c_int
        handle.fv_flatten.argtypes = POINTER(IdsArg), *(c_int64,) * 5, c_int32, POINTER(c_int64)
        handle.fv_transpose.argtypes = POINTER(CellsArg), c_int64, c_int64, c_int32, POINTER(c_int64)
        handle.fv_flatten.restype = handle.fv_transpose.restype = c_void_p
        handle.fv_flat_take.argtypes, handle.fv_flat_take.restype = (c_void_p,) * 8, None
    except (OSError, AttributeError) as error:
        return f"the C++ core could not be loaded ({error})"
    # A job without work answers 0 when both sides have the same version.
    code = handle.fv_forward(ctypes.byref(Job(abi=ABI)))
    if code:
        return _FAILURES.get(code, f"the C++ core returned {code}")
    return Library(handle, int(handle.fv_best_isa()), _torch_threads())


def _torch_threads() -> int | None:
    """Find how torch's own OpenMP runtime starts a parallel region.

    Idle OpenMP threads spin for milliseconds after torch's last operator. A second pool would compete with them for
    the cores; the same runtime's threads are there already. GNU's and LLVM's runtimes both have the entry point.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    runtimes = [p for p in paths if Path(p).name.startswith(("libgomp", "libiomp5", "libomp"))]
    if len(runtimes) != 1:  # with several, nobody knows which one torch uses
        return None
    try:
        entry = ctypes.CDLL(runtimes[0]).GOMP_parallel
    except (OSError, AttributeError):
        return None
    return ctypes.cast(entry, c_void_p).value


def library() -> Library:
    """Return the loaded core.

    Raises:
        UnsupportedError: if it is not there; the message says why.
    """
    found = _load()
    if isinstance(found, str):
        raise UnsupportedError(f"backend 'cpu': {found}.")
    return found


def absent() -> str | None:
    """Say why the core is not there (a phrase), None if it is."""
    found = _load()
    return found if isinstance(found, str) else None


# ---- instruction sets -------------------------------------------------------------------------------------------

_FORCED: contextvars.ContextVar[int | None] = contextvars.ContextVar("foveate_isa", default=None)


def isa_levels() -> tuple[str, ...]:
    """Return the names of the instruction sets this CPU can run the core with, slowest first."""
    return ISA_NAMES[: library().best_isa + 1]


def isa() -> int:
    """Return the instruction set calls run with: the best one, unless `forced_isa` says otherwise."""
    forced = _FORCED.get()
    return library().best_isa if forced is None else forced


@contextmanager
def forced_isa(name: str) -> Iterator[None]:
    """Run the calls inside a `with` block, their backward passes included, with a named instruction set.

    Raises:
        UnknownNameError: if this CPU does not have it.
    """
    if name not in isa_levels():
        raise unknown("instruction set", name, isa_levels())
    token = _FORCED.set(ISA_NAMES.index(name))
    try:
        yield
    finally:
        _FORCED.reset(token)
