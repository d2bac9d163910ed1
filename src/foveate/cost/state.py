"""What decoding keeps of one sample, counted by letting every layer of a network read a whole sequence."""

from __future__ import annotations

from typing import Any

import torch

from foveate.core.errors import UnsupportedError
from foveate.mechanisms.past import past_bytes
from foveate.models.backbone import Backbone


def decoding_bytes(network: Backbone) -> int | None:
    """Return the bytes that all layers of a causal network keep of one sample after its whole grid.

    Keys and values grow with the grid, the state of a scan does not. What is kept depends on shapes only, so the
    tokens are zeros. The network's mode and gradients stay as they are.

    Args:
        network: the network, on any device and in any dtype.

    Returns:
        The bytes, or None when a layer has no `prefill` and `step`, says that it cannot decode, or the network looks
        both ways.
    """
    if not network.spec.causal:
        return None
    like = network.head.weight
    x = torch.zeros(1, network.spec.grid.numel, network.spec.dim, device=like.device, dtype=like.dtype)
    total = 0
    for block in network.blocks:
        mixer: Any = block.mixer
        if not (hasattr(mixer, "prefill") and hasattr(mixer, "step")):
            return None
        modes = [(part, part.training) for part in mixer.modules()]
        mixer.eval()
        try:
            with torch.no_grad():
                _, past = mixer.prefill(x)
        except UnsupportedError:
            return None
        finally:
            for part, mode in modes:
                part.training = mode
        total += past_bytes(past)
    return total
