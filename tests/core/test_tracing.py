"""Our marker is torch's marker."""

import torch

from foveate.core.tracing import constant_while_tracing, run_eagerly


def test_the_marker_is_torchs():
    def ours():
        """Ours."""

    def theirs():
        """Theirs."""

    constant_while_tracing(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs)


def test_marked_functions_run_while_tracing():
    asked = []

    @constant_while_tracing
    def price(n):
        asked.append(n)
        return n * 3

    compiled = torch.compile(lambda x: x + price(4), backend="eager", fullgraph=True)
    assert compiled(torch.zeros(())).item() == 12
    assert compiled(torch.ones(())).item() == 13
    assert asked == [4]


def test_what_runs_eagerly_is_neither_traced_nor_compiled():
    tracing = []

    @run_eagerly
    def grown(x):
        tracing.append(torch.compiler.is_compiling())
        for _ in range(int(x.sum())):
            x = x + 1
        return x

    compiled = torch.compile(lambda x: 3 * grown(2 * x), backend="eager")
    for n in (1, 2, 3):
        assert compiled(torch.ones(n)).equal(torch.full((n,), 6.0 * (n + 1)))
    assert tracing == [False] * 3
