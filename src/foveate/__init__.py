"""foveate: find the right attention for a workload, prove it on your machine, drop it into your model."""

from foveate.core.grid import Grid as Grid
from foveate.core.registry import create as create
from foveate.core.registry import list_systems as list_systems

__version__ = "0.1.0.dev0"
