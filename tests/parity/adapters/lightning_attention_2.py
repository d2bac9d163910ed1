"""The authors' operator (B, H, N, D) and flash-linear-attention's plain recurrences (B, T, H, D) -> ours."""

from foveate.kernels.scan.api import normalized_scan, scan
from foveate.mechanisms.linear.lightning_attention_2 import lightning_attention_2


def operator(vector):
    slopes = vector.input("s") if vector.has("in.s") else None
    out = lightning_attention_2(vector.input("q"), vector.input("k"), vector.input("v"), slopes)
    return {name: out for name in ("out.out", "out.triton", "out") if vector.has(name)}


def heads_first(vector):
    return tuple(vector.input(name).transpose(1, 2) for name in ("q", "k", "v"))


def scale_of(vector):
    return vector.config.get("scale") or vector.input("q").shape[-1] ** -0.5


def state_of(vector):
    return vector.input("initial_state") if vector.has("in.initial_state") else None


def simple_gla(vector):
    q, k, v = heads_first(vector)
    g = vector.input("g").transpose(1, 2) if vector.has("in.g") else None
    out, state = scan(
        q, k, v, decay=g, scale=scale_of(vector), initial_state=state_of(vector), return_state=True
    )
    return results(vector, out, state)


def linear_attn(vector):
    if not vector.config.get("normalize", True):
        return simple_gla(vector)
    q, k, v = heads_first(vector)
    out, state = normalized_scan(q, k, v, scale=scale_of(vector), return_state=True)
    # flash-linear-attention keeps the running sum of keys apart, as (B, 1, H, K).
    return results(vector, out, state[..., :-1]) | {"out.final_z": state[..., -1].unsqueeze(1)}


def results(vector, out, state):
    if vector.has("cotangent"):
        vector.seed("cotangent", "out.o")
    both = {"out.o": out.transpose(1, 2), "out.final_state": state}
    return {name: value for name, value in both.items() if vector.has(name)}


PARTS = {
    "op*": operator,
    "nodecay*": operator,
    "fla_simple_gla*": simple_gla,
    "fla_linear_attn*": linear_attn,
}
