"""Terminator (arXiv 2401.17948): how small the slow networks are, and what the global operator costs."""

from collections.abc import Iterator

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.papers import Figure
from foveate.kernels.flops import attention_flops
from foveate.mechanisms.gated.terminator_hyperzzw import TerminatorLayer, hyper_global, standard
from foveate.mechanisms.magnet import Magnet

# The authors' configuration for CIFAR-10: channels of five blocks, their growth, multiplications of the global slow
# network, earlier maps that are joined.
BLOCKS = ((3, 4, 3, 0), (12, 3, 2, 0), (36, 2, 2, 1), (72, 2, 2, 1), (144, 2, 2, 2))
SIDE = 32
# What maps the context inside the networks that draw local kernels: the authors count it to the fast network.
FAST = ("reduce", "fc", "factors", "alpha", "beta")


def figures() -> Iterator[Figure]:
    """Yield parameters, the share of slow networks, multiply-adds and means of features."""
    layers = [
        TerminatorLayer(dim=dim, size=SIDE, out=dim * growth, layers=(deep, 2, 2, 2, 2), previous=previous)
        for dim, growth, deep, previous in BLOCKS
    ]
    total = sum(p.numel() for layer in layers for p in layer.parameters())
    slow = sum(
        p.numel()
        for layer in layers
        for net in layer.modules()
        if isinstance(net, Magnet)
        for name, p in net.named_parameters()
        if name.split(".")[0] not in FAST
    )
    how = "our layers in the authors' configuration for CIFAR-10, without block norms and classifier"
    yield Figure(claim="parameters of the five layers", paper="not given", ours=f"{total:,}", how=how)
    yield Figure(
        claim="share of the slow networks' parameters", paper="8%", ours=f"{slow / total:.1%}", how=how
    )
    dim = BLOCKS[-1][0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.randn(1, dim, SIDE, SIDE)
        hyper_global(x, layers[-1].kernel(), standard(x))
        drawn = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layers[-1].kernel()
    drawn -= (kernel := counter.get_total_flops())
    pairs = attention_flops(SIDE**4, dim, dim)
    yield Figure(
        claim="multiply-adds of the global operator, of its kernel (once a batch), of all pairs of pixels",
        paper="linear, where attention is quadratic",
        ours=f"{drawn / 2e6:.1f}M, {kernel / 2e6:.1f}M, {pairs / 2e6:.0f}M",
        how=f"{dim} channels, {SIDE} x {SIDE} pixels; a product of matrices takes N^1.5 C, not N C",
    )
    with torch.no_grad():
        mean = standard(layers[-1].mixer(x)).mean((2, 3)).abs().max().item()
        product = hyper_global(x, layers[-1].kernel(), standard(x))
        later = (product.mean((2, 3)).abs() / product.std((2, 3))).max().item()
    yield Figure(
        claim="largest mean of a channel over its deviation: a normed branch, the global operator's result",
        paper="zero-mean features",
        ours=f"{mean:.0e}, {later:.2f}",
        how="random input, initial weights; the result of the operator meets the next norm later",
    )
