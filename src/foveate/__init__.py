"""foveate: find the right attention for a workload, prove it on your machine, drop it into your model.

out = foveate.attend(q, k, v, where=foveate.Neighborhood((64, 64), 13))      # the algebra
print(foveate.explain(q, k, v, where=foveate.Neighborhood((64, 64), 13)))    # what it will cost, and why
layer = foveate.create("biformer", dim=64, heads=4)                          # a published system
foveate.compare(workloads=["shapes"]).to_html("report.html")                 # which one to use here
"""

from typing import TYPE_CHECKING

from foveate.core.errors import ArgumentError as ArgumentError
from foveate.core.errors import FoveateError as FoveateError
from foveate.core.errors import MissingExtraError as MissingExtraError
from foveate.core.errors import UnknownNameError as UnknownNameError
from foveate.core.errors import UnsupportedError as UnsupportedError
from foveate.core.grid import Grid as Grid
from foveate.core.registry import create as create
from foveate.core.registry import get_system as get_system
from foveate.core.registry import list_systems as list_systems
from foveate.core.registry import system as system
from foveate.cost.explain import Explanation as Explanation
from foveate.cost.explain import explain as explain
from foveate.kernels.attend import apply as apply
from foveate.kernels.attend import attend as attend
from foveate.kernels.banks import Bank as Bank
from foveate.kernels.banks import attend_banks as attend_banks
from foveate.kernels.merge import merge as merge
from foveate.kernels.sample.api import sample as sample
from foveate.kernels.scan.api import normalized_scan as normalized_scan
from foveate.kernels.scan.api import scan as scan
from foveate.kernels.scan.api import scan_step as scan_step
from foveate.kernels.scan.selective import selective_scan as selective_scan
from foveate.patterns.banks import Beside as Beside
from foveate.patterns.basic import BlockList as BlockList
from foveate.patterns.basic import Causal as Causal
from foveate.patterns.basic import Explicit as Explicit
from foveate.patterns.basic import Full as Full
from foveate.patterns.basic import Sinks as Sinks
from foveate.patterns.basic import SlidingWindow as SlidingWindow
from foveate.patterns.grids import Halo as Halo
from foveate.patterns.grids import Lattice as Lattice
from foveate.patterns.grids import Neighborhood as Neighborhood
from foveate.patterns.grids import Windows as Windows
from foveate.patterns.lower import lower as lower
from foveate.patterns.pattern import Pattern as Pattern
from foveate.patterns.power import PowerBlocks as PowerBlocks
from foveate.patterns.schedule import Mean as Mean
from foveate.patterns.schedule import Schedule as Schedule
from foveate.patterns.schedule import Weights as Weights
from foveate.patterns.segments import Segments as Segments
from foveate.patterns.selection import Selection as Selection
from foveate.patterns.specials import with_specials as with_specials
from foveate.patterns.strided import Strided as Strided
from foveate.scores.after import Add as Add
from foveate.scores.after import Dropout as Dropout
from foveate.scores.after import Multiply as Multiply
from foveate.scores.bias import Bias as Bias
from foveate.scores.bias import Gathered as Gathered
from foveate.scores.bias import KeyBias as KeyBias
from foveate.scores.buckets import BucketTable as BucketTable
from foveate.scores.buckets import T5Buckets as T5Buckets
from foveate.scores.distance import ALiBi as ALiBi
from foveate.scores.distance import DistanceDecay as DistanceDecay
from foveate.scores.relative import RelativeTable as RelativeTable
from foveate.scores.rotary import rotary as rotary
from foveate.scores.rules import Exp as Exp
from foveate.scores.rules import ReLU as ReLU
from foveate.scores.rules import Sigmoid as Sigmoid
from foveate.scores.rules import Softmax as Softmax
from foveate.scores.skew import RelativeLogits as RelativeLogits
from foveate.scores.temperature import RowFactor as RowFactor
from foveate.scores.temperature import SoftCap as SoftCap

if TYPE_CHECKING:
    from foveate.advise.compare import compare as compare

__version__ = "0.1.0.dev0"


def __getattr__(name: str):
    # `compare` brings the measuring rooms and their optional dependencies, so it is imported when asked for.
    if name == "compare":
        from foveate.advise.compare import compare as compare

        return compare
    raise AttributeError(f"module 'foveate' has no attribute {name!r}")
