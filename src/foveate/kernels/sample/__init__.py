"""The sample primitive: multi-linear sampling of feature maps at fractional positions, reduced inside."""

from foveate.kernels.sample.api import sample as sample
