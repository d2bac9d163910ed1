"""Who may attend to whom: patterns, selections, and the Schedule they lower to. Integers only."""

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
from foveate.patterns.pattern import Pattern as Pattern
