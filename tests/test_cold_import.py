"""`import foveate` needs torch and jaxtyping only, has no side effects, and is quick."""

import subprocess
import sys

FORBIDDEN = (
    *("sklearn", "skimage", "matplotlib", "jinja2", "torchmetrics", "timm", "transformers", "diffusers"),
    *("triton", "rich", "typer", "scipy", "pandas", "beartype", "safetensors"),
)

CODE = f"""
import sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"{{name}} is forbidden here", name=name)

start = time.perf_counter()
import torch, jaxtyping
torch_seconds = time.perf_counter() - start

def state():
    return (
        torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(),
        torch.random.get_rng_state().sum().item(), torch.is_grad_enabled(), list(sys.path),
    )

before = state()
sys.meta_path.insert(0, Refuse())
start = time.perf_counter()
import foveate
foveate.list_systems()
seconds = time.perf_counter() - start
assert state() == before, (before, state())
assert "torch._dynamo" not in sys.modules, "importing it takes seconds: see core/tracing.py"
print(seconds, torch_seconds)
"""


def test_import_needs_no_optional_module_is_quick_and_changes_nothing():
    result = subprocess.run([sys.executable, "-W", "error", "-c", CODE], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # The two times are all that was printed: importing is silent.
    seconds, torch_seconds = map(float, result.stdout.split())
    # Relative to torch's own import, as machines and their load differ; all systems are imported too.
    assert seconds < max(1.0, torch_seconds)
