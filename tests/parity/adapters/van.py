"""VAN: the gate is `spatial_gating_unit`, its convolutions are numbered."""

from foveate.mechanisms.gated.van import VANAttention

GATE = "spatial_gating_unit"
RENAME = {
    "proj_1": "proj_in",
    "proj_2": "proj_out",
    f"{GATE}.conv0": "gate.local",
    f"{GATE}.conv_spatial": "gate.dilated",
    f"{GATE}.conv1": "gate.mix",
}


def attention(vector):
    module = VANAttention(dim=vector.config["d_model"])
    vector.load(module, rename=RENAME)
    return {"out": module(vector.input("x"))}


PARTS = {"attention*": attention}
