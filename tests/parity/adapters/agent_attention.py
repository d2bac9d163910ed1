"""Agent attention in its Swin (one window), DeiT (class token) and PVT (reduced keys) forms; our names."""

from foveate.core.grid import Grid
from foveate.mechanisms.linear.agent_attention import AgentAttention


def build(vector, grid, **options):
    config = vector.config
    module = AgentAttention(
        dim=config["dim"],
        heads=config["num_heads"],
        grid=grid,
        agents=config["agent_num"],
        qkv_bias=config.get("qkv_bias", True),
        **options,
    ).eval()
    vector.load(module)
    return {"out": module(vector.input("x"))}


def swin(vector):
    return build(vector, Grid(*vector.config["window_size"]))


def deit(vector):
    return build(vector, Grid(vector.config["window"], vector.config["window"]), class_token=True)


def pvt(vector):
    # Rows and columns are told by the tables of the queries: (1, H, h, 1, n) and (1, H, 1, w, n).
    rows, columns = vector.param("ha_bias").shape[2], vector.param("wa_bias").shape[3]
    return build(vector, Grid(rows, columns), reduction=vector.config["sr_ratio"])


PARTS = {"swin*": swin, "deit*": deit, "pvt*": pvt}
