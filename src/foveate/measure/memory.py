"""Peak memory of one call: the most bytes of tensors that were alive at once above what was there before.

On CUDA it is the allocator's own high-water mark. On a CPU torch keeps none, so the profiler's record of
every allocation and release is replayed and the running sum's maximum taken. Both count what torch's
allocators hand out (activations, temporaries inside operators, gradients); neither counts the Python
process, thread pools or scratch space that a vendor's library takes from the system by itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from foveate.measure.timer import synchronize

# What the profiler says of itself; freeing memory that was there before is exactly what is not counted.
_CHATTER = (b"USDT:", b"was allocated before the profiling started")

METHOD = {
    "cpu": "replayed torch.profiler allocation record (tensors and operator temporaries, above the start)",
    "cuda": "torch.cuda.max_memory_allocated above the start",
}


@contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Drop the lines the profiler writes to the error stream about itself; pass everything else on."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # no error stream to protect
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            for line in caught.read().splitlines(keepends=True):
                if not any(noise in line for noise in _CHATTER):
                    os.write(2, line)


def _peak_cpu(call: Callable[[], Any]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _without_profiler_chatter(),
        torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile,
    ):
        call()
    # torch has no public view of single allocations; a test replays a known sequence against this one.
    recorder: Any = profile.profiler
    events = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    alive = peak = 0
    for event in events:
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def _peak_cuda(call: Callable[[], Any], device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return max(0, torch.cuda.max_memory_allocated(device) - before)


def peak_bytes(call: Callable[[], Any], *, device: str | torch.device = "cpu") -> int | None:
    """Return the peak memory of `call()` in bytes, above what was allocated before it.

    Args:
        call: run exactly once; warm it up first, so that caches are not billed to it.
        device: "cpu" or a CUDA device.

    Returns:
        Bytes, or None on a device whose allocator offers no peak.
    """
    where = torch.device(device)
    if where.type == "cpu":
        return _peak_cpu(call)
    if where.type == "cuda":
        return _peak_cuda(call, where)
    return None
