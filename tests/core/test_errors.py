"""Errors read alike: argument, expectation, value, remedy."""

import pytest
import torch

from foveate.core.dtypes import accumulation_dtype
from foveate.core.errors import (
    ArgumentError,
    FoveateError,
    MissingExtraError,
    UnknownNameError,
    UnsupportedError,
    bad,
    need_extra,
    unknown,
)


def test_bad_restates_the_argument():
    error = bad("window", 9, "at most 7", "Use a smaller window.")
    assert isinstance(error, ArgumentError)
    assert isinstance(error, ValueError)
    assert str(error) == "window: expected at most 7, got 9. Use a smaller window."
    assert str(bad("x", "a", "b")) == "x: expected b, got 'a'."


def test_unknown_lists_the_nearest_names_or_some():
    near = unknown("backend", "tile", ["tiles", "sdpa"])
    assert isinstance(near, UnknownNameError)
    assert str(near) == "backend 'tile' is not known. Did you mean 'tiles'?"
    assert str(unknown("backend", "zzz", ["tiles", "sdpa"])).endswith("Known names include 'sdpa', 'tiles'.")


def test_missing_extras_give_the_pip_line():
    error = need_extra("jinja2", "compare")
    assert isinstance(error, MissingExtraError)
    assert isinstance(error, ImportError)
    assert "pip install 'foveate[compare]'" in str(error)
    assert "'jinja2'" in str(error)


def test_one_base_for_all():
    for error in (ArgumentError, UnsupportedError, UnknownNameError, MissingExtraError):
        assert issubclass(error, FoveateError)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_accumulation_is_float32_or_better(dtype, expected):
    assert accumulation_dtype(dtype) == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ArgumentError, match=r"^dtype: expected a floating point dtype"):
        accumulation_dtype(dtype)
