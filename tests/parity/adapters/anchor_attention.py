"""The authors' search for stripes: (B, H, N, D) as ours, coordinates padded with zeros."""

from foveate.routing.stripes import StripeRouter


def select(vector):
    config = vector.config
    router = StripeRouter(
        block=config["block_size_N"], step=config["step"], theta=config["diff"], official=True
    )
    q, k, anchors = vector.input("Q"), vector.input("K"), vector.input("anchors")
    ids, counts = router.coordinates(q, k, anchors, config["sm_scale"])
    return {"out.true_coords": ids, "out.true_counts": counts}


PARTS = {"select*": select}
