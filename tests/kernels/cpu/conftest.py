"""Without the core, only `test_library.py` can say anything; it says why the core is not there."""

from foveate.kernels.cpu.library import absent

collect_ignore_glob = [] if absent() is None else ["test_[!l]*.py"]
