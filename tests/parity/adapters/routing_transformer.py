"""The authors' clustered attention helper, without projections; `param.*` are the centroids."""

from foveate.mechanisms.routed.routing_transformer import ClusterRouting


def helper(vector, training=False):
    config = vector.config
    q = vector.input("q")
    module = ClusterRouting(
        heads=q.shape[1],
        width=q.shape[3],
        clusters=config["sparsity_cluster_size"],
        members=config["attention_window"],
        masked=config["masked"],
        share_qk=config["share_qk"],
        strided=config["strided_attention"],
        beta=config.get("beta", 1e-4),
        decay=config.get("decay", 0.99),
        official=True,
    ).train(training)
    vector.load(module.centroids)
    out, loss = module(q, vector.input("k"), vector.input("v"))
    results = {"out.out": out, "out.loss": loss.reshape(1)}
    for name, buffer in module.centroids.state_dict().items():
        for stored in (f"out.{name}", f"out.new_{name}", f"out.updated_{name}", f"out.{name}_after"):
            if vector.has(stored):
                results[stored] = buffer
    return {name: value for name, value in results.items() if vector.has(name)}


def train(vector):
    return helper(vector, training=True)


PARTS = {"cluster*": helper, "strided*": helper, "train*": train}
