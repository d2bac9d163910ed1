"""Which dtype mathematics is done in, given the dtype the user stores."""

import torch

from foveate.core.errors import bad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype logits and sums are kept in: float64 for float64, float32 for the rest.

    Raises:
        ArgumentError: if `dtype` is not one of float16, bfloat16, float32, float64.
    """
    if dtype not in FLOATS:
        raise bad("dtype", dtype, "a floating point dtype", "Convert the tensors with .float() first.")
    return torch.float64 if dtype == torch.float64 else torch.float32
