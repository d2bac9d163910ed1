"""The authors' decoding path, run for every position."""

from foveate.mechanisms.routed.superlinear_attention import attend_spans
from foveate.routing.spans import Stripe, search_spans


def op(vector):
    config = vector.config
    inverse = config.get("inv_search_power_int")
    stripe = Stripe(
        index=config["sw_index"],
        search_power=1 / inverse if inverse else config["search_power"],
        backward=config.get("backward_factor", 2.0),
        forward=config.get("forward_factor", 0.0),
        span_power=config.get("span_power", 0.5),
        official=True,
    )
    q1, q2, k, v = (vector.input(name) for name in ("Q1", "Q2", "K", "V"))
    present = vector.take("in.attention_mask") != 0 if vector.has("in.attention_mask") else None
    found = search_spans(q1, k, stripe, spans=config["topk"], present=present)
    results = {
        "out.out": attend_spans(q2, k, v, found, stripe, present=present),
        "out.qstart": found.start,
        "out.qend": found.end,
        "out.values": found.score,
    }
    return {name: value for name, value in results.items() if vector.has(name)}


PARTS = {"op*": op, "power*": op}
