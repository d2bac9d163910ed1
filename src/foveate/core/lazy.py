"""`cached_property` that torch.compile can trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from functools import cached_property as cached_property
else:

    class cached_property:
        """`functools.cached_property` without its lock, which Python 3.11 still has and tracing cannot enter.

        While torch.compile traces, nothing is kept: what is computed then belongs to the graph.
        """

        def __init__(self, make):
            self.make, self.__doc__ = make, make.__doc__

        def __set_name__(self, owner, name):
            self.name = name

        def __get__(self, instance, owner=None):
            if instance is None:
                return self
            if torch.compiler.is_compiling():
                return self.make(instance)
            kept = instance.__dict__
            if self.name not in kept:
                kept[self.name] = self.make(instance)
            return kept[self.name]
