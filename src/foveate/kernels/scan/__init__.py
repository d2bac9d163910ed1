"""The scan primitive: linear attention with decay, as quadratic form, chunks, or a recurrence."""

from foveate.kernels.scan.api import normalized_scan as normalized_scan
from foveate.kernels.scan.api import scan as scan
from foveate.kernels.scan.api import scan_step as scan_step
from foveate.kernels.scan.cost import ScanCost as ScanCost
from foveate.kernels.scan.cost import crossover_length as crossover_length
from foveate.kernels.scan.cost import scan_cost as scan_cost
from foveate.kernels.scan.selective import selective_scan as selective_scan
from foveate.kernels.scan.selective import selective_states as selective_states
from foveate.kernels.scan.selective import selective_step as selective_step
from foveate.kernels.scan.walk import along as along
from foveate.kernels.scan.walk import put_back as put_back
