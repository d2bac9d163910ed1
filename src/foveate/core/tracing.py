"""What torch.compile must run instead of trace."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(fn: F) -> F:
    """Mark a function of constants: torch.compile runs it and takes the result as a constant of the graph.

    The same as `torch.compiler.assume_constant_result`, which would import all of torch._dynamo, seconds of
    it, the moment it decorates. A test holds the two together.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def run_eagerly(fn: F) -> F:
    """Mark a function that torch.compile must leave alone: loops over what content decides, with new sizes each time.

    `torch.compiler.disable` at the moment of the call: as a decorator it would import all of torch._dynamo.
    """

    @wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(fn)(*args, **options)
        return fn(*args, **options)

    return call  # type: ignore[return-value]


def fixed(n: int) -> int:
    """Return `n`; while compiling, as a constant: a size that torch.compile took for variable is pinned.

    Functions marked with `constant_while_tracing` take constants only, and the second shape or the second
    pattern that a compiled function meets makes torch.compile think of numbers as variables. Another value
    compiles again.
    """
    if not torch.compiler.is_compiling():
        return n
    return len(range(n)) if n >= 0 else -len(range(-n))
