"""Our marker is torch's marker."""

import torch

from foveate.core.tracing import constant_while_tracing


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
