"""DFA3D's operator: values and distributions in one row per view, levels one after another, heads inside."""

import math

import torch

from foveate.kernels.sample import sample
from foveate.mechanisms.routed.dfa3d import corner_depths


def operator(vector):
    value, depth = vector.input("value"), vector.input("value_dpt_dist")
    points = vector.input("sampling_locations").transpose(1, 2)
    weights = vector.input("attention_weights").transpose(1, 2)
    sizes = [tuple(row) for row in vector.take("in.value_spatial_shapes").tolist()]
    starts = vector.take("in.value_level_start_index").tolist()
    maps, factor = [], []
    for size, start in zip(sizes, starts, strict=True):
        for found, x in ((maps, value), (factor, depth)):
            level = x.narrow(1, start, math.prod(size[:2])).unflatten(1, size[:2])
            found.append(level.permute(0, 3, 4, 1, 2))
    out = sample(maps, points, weights, factor=factor)
    scores = corner_depths(factor, points).transpose(1, 2)
    # Theirs go round the square, ours row by row.
    around = [scores[..., 0], scores[..., 1], scores[..., 3], scores[..., 2]]
    return {
        "out.output": out.transpose(1, 2).flatten(2),
        "out.depth_score": torch.stack(around, dim=-1),
    }


PARTS = {"op*": operator}
