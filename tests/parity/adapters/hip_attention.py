"""The authors' reference of the search and their sparse kernel; q comes scaled, heads stand in the batch."""

from foveate.kernels.attend import attend
from foveate.mechanisms.routed.hip_attention import hip_selection


def draft(vector):
    config = vector.config
    q, k, v = (vector.input(name).unsqueeze(1) for name in "qkv")
    found, where = hip_selection(
        q,
        k,
        keys=config["mask_k"],
        block_q=config["block_size_q"],
        block_k=config["block_size_k"],
        group=config.get("block_size_k_group", 1),
        window=config["sliding_window_size"],
        sink=config.get("sink_token_size", 32),
        oracle=config.get("oracle_rep", False),
        official=True,
    )
    out = attend(q, k, v, where=where, scale=1.0).squeeze(1)
    results = {
        "out.indices": found.starts.squeeze(1),
        "out.ks": found.count.expand(q.shape[0], -1),
        "out.allowed": where.dense().squeeze(1),
        "out.out": out,
        "out.out_ref": out,
    }
    return {name: value for name, value in results.items() if vector.has(name)}


PARTS = {"draft*": draft}
