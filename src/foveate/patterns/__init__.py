"""Who may attend to whom: patterns, selections, and the Schedule they lower to. Integers only."""

from foveate.patterns.axis import AxisRule as AxisRule
from foveate.patterns.axis import LocalAxis as LocalAxis
from foveate.patterns.basic import BlockList as BlockList
from foveate.patterns.basic import Causal as Causal
from foveate.patterns.basic import Explicit as Explicit
from foveate.patterns.basic import Full as Full
from foveate.patterns.basic import Sinks as Sinks
from foveate.patterns.basic import SlidingWindow as SlidingWindow
from foveate.patterns.compose import And as And
from foveate.patterns.compose import Not as Not
from foveate.patterns.compose import Or as Or
from foveate.patterns.grids import Halo as Halo
from foveate.patterns.grids import Lattice as Lattice
from foveate.patterns.grids import Neighborhood as Neighborhood
from foveate.patterns.grids import PaddedGrid as PaddedGrid
from foveate.patterns.grids import Windows as Windows
from foveate.patterns.pattern import Padded as Padded
from foveate.patterns.pattern import Pattern as Pattern
from foveate.patterns.segments import Segments as Segments
from foveate.patterns.selection import Selection as Selection
from foveate.patterns.specials import Specials as Specials
from foveate.patterns.specials import with_specials as with_specials
