"""What torch.compile must run instead of trace."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant_while_tracing(fn: F) -> F:
    """Mark a function of constants: torch.compile runs it and takes the result as a constant of the graph.

    The same as `torch.compiler.assume_constant_result`, which would import all of torch._dynamo, seconds of
    it, the moment it decorates. A test holds the two together.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn
