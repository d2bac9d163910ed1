"""How strongly queries attend (scores), by which rule, and what happens to the weights after."""

from foveate.scores.after import Add as Add
from foveate.scores.after import After as After
from foveate.scores.after import Dropout as Dropout
from foveate.scores.after import Multiply as Multiply
from foveate.scores.base import Additive as Additive
from foveate.scores.base import Score as Score
from foveate.scores.bias import Bias as Bias
from foveate.scores.bias import Gathered as Gathered
from foveate.scores.bias import KeyBias as KeyBias
from foveate.scores.distance import ALiBi as ALiBi
from foveate.scores.distance import DistanceDecay as DistanceDecay
from foveate.scores.distance import alibi_slopes as alibi_slopes
from foveate.scores.pairs import Pairs as Pairs
from foveate.scores.relative import RelativeTable as RelativeTable
from foveate.scores.rotary import axial_rotary as axial_rotary
from foveate.scores.rotary import rotary as rotary
from foveate.scores.rules import Exp as Exp
from foveate.scores.rules import ReLU as ReLU
from foveate.scores.rules import Rule as Rule
from foveate.scores.rules import Sigmoid as Sigmoid
from foveate.scores.rules import Softmax as Softmax
from foveate.scores.temperature import RowFactor as RowFactor
from foveate.scores.temperature import SoftCap as SoftCap
