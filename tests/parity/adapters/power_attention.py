"""PowerAttention by its printed algorithm: (B, H, N, D) tensors and the mask."""

from foveate.mechanisms.local.power_attention import power_attention
from foveate.patterns.power import PowerBlocks


def listing(vector):
    config = vector.config
    options = {name: config[name] for name in ("block_size", "window_size", "sink_size") if name in config}
    names = {"block_size": "block", "window_size": "window", "sink_size": "sinks"}
    options = {names[name]: value for name, value in options.items()}
    q, k, v = (vector.input(name) for name in ("query", "key", "value"))
    results = {"out.output": power_attention(q, k, v, scale=config.get("scale"), **options)}
    if vector.has("mask.allowed"):
        results["mask.allowed"] = PowerBlocks(**options).dense(q.shape[2], k.shape[2])
    return results


PARTS = {"paper_listing*": listing}
