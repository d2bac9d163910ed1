import json
import platform

import torch

from foveate.measure.fingerprint import fingerprint


def test_says_what_machine_this_is():
    found = fingerprint()
    assert found.cpu
    assert found.cpu != "unknown CPU"
    assert found.torch == torch.__version__
    assert found.python == platform.python_version()
    assert 1 <= found.usable_cores <= found.cores
    assert found.ram_bytes > 2**28
    assert found.gpu is None
    assert found.torch_isa == torch.backends.cpu.get_cpu_capability()


def test_follows_the_thread_count():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert fingerprint().threads == 1
    finally:
        torch.set_num_threads(before)


def test_is_json_and_names_nobody():
    text = json.dumps(fingerprint().as_dict())
    assert platform.node() not in text
    assert "avx" in text or platform.machine() not in ("x86_64", "AMD64")
    assert str(fingerprint().threads) in fingerprint().sentence
