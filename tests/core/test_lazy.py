import torch

from foveate.core.lazy import cached_property


class Thing:
    def __init__(self):
        self.made = 0

    @cached_property
    def value(self):
        """What it says."""
        self.made += 1
        return self.made


def test_made_once():
    thing = Thing()
    assert (thing.value, thing.value, thing.made) == (1, 1, 1)
    assert Thing.value.__doc__ == "What it says."


def test_objects_made_while_tracing_can_use_it():
    class Scale:
        def __init__(self, x):
            self.x = x

        @cached_property
        def double(self):
            return self.x * 2

    f = torch.compile(lambda x: Scale(x).double, fullgraph=True, backend="eager")
    assert f(torch.ones(2)).tolist() == [2, 2]
