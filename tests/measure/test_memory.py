import os

import torch

from foveate.measure.memory import peak_bytes
from tests.measure.toys import toy

MEGA = 1_000_000


def test_peak_is_the_most_that_was_alive_at_once():
    def call():
        a = torch.ones(MEGA)
        b = torch.ones(MEGA)
        del a, b
        c = torch.ones(MEGA)
        return c

    peak = peak_bytes(call)
    assert 8 * MEGA <= peak < 8 * MEGA + 100_000


def test_temporaries_inside_an_operator_count():
    x = torch.ones(MEGA)
    peak = peak_bytes(lambda: x.double().sum())
    assert peak >= 8 * MEGA


def test_what_was_there_before_does_not_count():
    before = torch.ones(10 * MEGA)
    assert peak_bytes(lambda: before.mul_(2.0)) < 1000


def test_backward_needs_more_than_forward():
    subject = toy(dim=32)
    x = subject.sample(4)
    subject.step(x)
    with torch.no_grad():
        forward = peak_bytes(lambda: subject(x))
    assert peak_bytes(lambda: subject.step(x)) > forward > 0


def test_error_stream_keeps_other_lines(capfd):
    peak_bytes(lambda: os.write(2, b"a warning of ours\n"))
    assert capfd.readouterr().err == "a warning of ours\n"
