"""Walks the registry: every declared fact of every system is tested, with nothing known about any of them."""

import copy
import inspect
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import foveate.mechanisms
from foveate.core.errors import ArgumentError, UnsupportedError
from foveate.core.grid import Grid
from foveate.core.registry import FIDELITIES, get_system, list_systems
from foveate.mechanisms.layout import as_tokens
from tests.parity.runner import adapter_for, golden_files

SYSTEMS = [facts.key for facts in list_systems() if facts.cls.__module__.startswith("foveate.")]
EVEN = {1: Grid(16), 2: Grid(8, 8), 3: Grid(4, 4, 4)}
ODD = {1: (Grid(13), Grid(1)), 2: (Grid(5, 7), Grid(9, 2), Grid(1, 1)), 3: (Grid(3, 4, 5), Grid(1, 1, 1))}
DIM, HEADS = 16, 2


class Sourced(nn.Module):
    """A cross system in the place of a token mechanism: the tokens are its queries, `example` makes the rest."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        # Drawing numbers is no part of the system: compilers are not to look into it.
        return self.inner(x, *torch.compiler.disable(self.inner.example)(x))


def fresh(key: str, grid: Grid, *, causal: bool = False) -> nn.Module:
    """A system for a grid as a token mechanism."""
    facts = get_system(key)
    if facts.layout == "cross":
        return Sourced(facts.cls(dim=DIM, heads=HEADS))
    module = facts.cls.for_workload(dim=DIM, grid=grid, heads=HEADS, causal=causal)
    return as_tokens(module) if facts.layout == "spatial" else module


def build(key: str, grid: Grid, *, causal: bool = False, dtype=torch.float32) -> nn.Module:
    """A system for a grid as a token mechanism in eval mode, every parameter drawn at random."""
    torch.manual_seed(1)
    module = fresh(key, grid, causal=causal)
    with torch.no_grad():
        for parameter in module.parameters():
            # Around the initial value: norms stay near 1, and nothing stays exactly 0.
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.to(dtype).eval()


def tokens(grid: Grid, batch: int = 2, dtype=torch.float32) -> Tensor:
    return torch.randn(batch, grid.numel, DIM, generator=torch.Generator().manual_seed(2)).to(dtype)


def home_grid(key: str) -> Grid:
    """A grid the system accepts; two axes where it can, as most are for images."""
    dims = get_system(key).dims
    return EVEN[2 if 2 in dims else dims[0]]


def core(module: nn.Module) -> nn.Module:
    return getattr(module, "inner", module)


def refusal(module: nn.Module, x: Tensor, grid: Grid) -> str | None:
    """The message a module refuses an input with, None when it takes it."""
    try:
        module(x, grid)
    except ArgumentError as error:
        return str(error)
    return None


each = pytest.mark.parametrize("key", SYSTEMS)
LAYERS = [key for key in SYSTEMS if get_system(key).layout != "cross"]
each_layer = pytest.mark.parametrize("key", LAYERS)
each_cross = pytest.mark.parametrize("key", [key for key in SYSTEMS if key not in LAYERS])


def test_one_file_per_system():
    root = Path(foveate.mechanisms.__file__).parent
    files = {(p.parent.name, p.stem) for p in root.glob("*/*.py") if p.stem != "__init__"}
    modules = {tuple(get_system(key).cls.__module__.split(".")[-2:]) for key in SYSTEMS}
    assert files == modules
    assert {stem for _, stem in files} == set(SYSTEMS)


@each
def test_facts_are_complete_and_the_docstring_opens_with_the_paper(key):
    facts = get_system(key)
    doc = " ".join(facts.doc.split())
    assert doc.startswith(facts.title)
    assert facts.arxiv in doc
    assert str(facts.year) in doc
    assert facts.family == facts.cls.__module__.split(".")[-2]
    assert facts.fidelity in FIDELITIES
    assert facts.layout in ("tokens", "spatial", "cross")
    assert facts.role
    assert facts.cost.startswith("O(")
    assert set(facts.dims) <= {1, 2, 3}


@each
def test_options_are_keyword_only_documented_and_few(key):
    cls = get_system(key).cls
    parameters = inspect.signature(cls).parameters
    assert len(parameters) <= 12
    doc = inspect.getdoc(cls) or ""
    for name, parameter in parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, name
        assert name in doc, f"{name} is not documented"


@each
def test_vectors_mean_an_adapter_and_golden_files(key):
    if get_system(key).fidelity == "vectors":
        mine = [path for path in golden_files() if path.name.split(".")[0] == key]
        assert any(adapter_for(path) for path in mine)


@each_cross
def test_what_reads_from_sources_of_its_own_takes_them_and_says_why_it_is_no_layer(key):
    facts = get_system(key)
    assert not hasattr(facts.cls, "for_workload")
    assert facts.limits
    assert facts.causal == "no"
    module = core(build(key, home_grid(key)))
    x = torch.randn(2, 7, DIM)
    sources = module.example(x)
    assert module(x, *sources).shape == x.shape
    with pytest.raises(ArgumentError):
        module(x, *module.example(torch.randn(2, 6, DIM)))


@each_layer
def test_forward_on_every_number_of_axes(key):
    for dim in (1, 2, 3):
        grid = EVEN[dim]
        if dim in get_system(key).dims:
            y = build(key, grid)(tokens(grid), grid)
            assert y.shape == (2, grid.numel, DIM)
            assert y.dtype == torch.float32
            assert y.isfinite().all()
        else:
            with pytest.raises((ArgumentError, UnsupportedError), match="grid"):
                build(key, grid)


@each
def test_sizes_as_declared(key):
    facts = get_system(key)
    grids = [grid for dim in facts.dims for grid in ODD[dim]]
    if facts.sizes == "any":
        for grid in grids:
            y = build(key, grid)(tokens(grid), grid)
            assert y.shape == (2, grid.numel, DIM), grid
            assert y.isfinite().all(), grid
        return
    home = home_grid(key)
    module = build(key, home)
    messages = [refusal(module, tokens(grid), grid) for grid in grids if grid.ndim == home.ndim]
    refused = [message for message in messages if message is not None]
    assert refused, f"no size was refused, yet {facts.sizes!r} is declared"
    assert all(": expected" in message for message in refused)


@each
def test_wrong_inputs_are_named(key):
    grid = home_grid(key)
    module = build(key, grid)
    wrong = [
        torch.randn(2, grid.numel, DIM + 1),
        torch.randn(grid.numel, DIM),
        torch.ones(2, grid.numel, DIM, dtype=torch.long),
    ]
    if key in LAYERS:
        wrong.append(torch.randn(2, grid.numel - 1, DIM))
    for x in wrong:
        with pytest.raises(ArgumentError, match=r"^(x|dtype):"):
            module(x, grid)
    if get_system(key).layout == "tokens":
        with pytest.raises(ArgumentError, match=r"^grid:"):
            module(tokens(grid), grid.sizes)
        with pytest.raises(ArgumentError, match=r"^(dim|heads):"):
            get_system(key).cls.for_workload(dim=DIM, grid=grid, heads=3)


@each
def test_an_empty_batch_stays_empty_or_is_refused_by_name(key):
    grid = home_grid(key)
    module = build(key, grid)
    message = refusal(module, tokens(grid, batch=0), grid)
    if message is None:
        assert module(tokens(grid, batch=0), grid).shape == (0, grid.numel, DIM)
    else:
        assert message.startswith("x:")


@each
def test_every_parameter_has_a_gradient_unless_declared(key):
    grid = home_grid(key)
    module = build(key, grid).train()
    module(tokens(grid).requires_grad_(), grid).square().sum().backward()
    frozen = get_system(key).frozen_params
    named = dict(core(module).named_parameters())
    assert set(frozen) <= set(named) | {name for name, _ in core(module).named_buffers()}
    for name, parameter in named.items():
        if name in frozen:
            assert parameter.grad is None or not parameter.grad.any(), f"{name} is declared frozen"
        else:
            assert parameter.grad is not None, f"{name} has no gradient"
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, f"{name} has a zero gradient"


@each
def test_gradients_are_right_in_double_precision(key):
    facts = get_system(key)
    grid = {1: Grid(8), 2: Grid(4, 4), 3: Grid(2, 2, 4)}[home_grid(key).ndim]
    module = build(key, grid, dtype=torch.float64)
    wanted = {
        n: p for n, p in module.named_parameters() if n.removeprefix("inner.") not in facts.frozen_params
    }

    def call(x, *values):
        return torch.func.functional_call(module, dict(zip(wanted, values, strict=True)), (x, grid))

    x = tokens(grid, batch=1, dtype=torch.float64).requires_grad_()
    leaves = [p.detach().clone().requires_grad_() for p in wanted.values()]
    assert torch.autograd.gradcheck(call, (x, *leaves), fast_mode=True)


@each_layer
def test_causality_as_declared(key):
    facts = get_system(key)
    grid = Grid(24) if 1 in facts.dims else home_grid(key)
    if facts.causal == "no":
        with pytest.raises((ArgumentError, UnsupportedError), match="causal"):
            facts.cls.for_workload(dim=DIM, grid=grid, heads=HEADS, causal=True)
        return
    module = build(key, grid, causal=True, dtype=torch.float64)
    x = tokens(grid, batch=1, dtype=torch.float64)
    before = module(x, grid)
    for t in range(0, grid.numel, 3):
        changed = x.clone()
        changed[:, t] += torch.randn(DIM, dtype=torch.float64) * 3
        after = module(changed, grid)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t]), "a token does not see itself"
    if facts.causal == "optional":
        free = build(key, grid, dtype=torch.float64)
        changed = x.clone()
        changed[:, 12] += 3
        assert not torch.allclose(free(changed, grid)[:, :12], free(x, grid)[:, :12])


@each
def test_coupling_between_samples_as_declared(key):
    grid = home_grid(key)
    module = build(key, grid, dtype=torch.float64)
    x = tokens(grid, batch=3, dtype=torch.float64)
    alone = module(x[:1], grid)
    together = module(x, grid)[:1]
    if get_system(key).batch_coupled:
        assert not torch.allclose(alone, together)
    else:
        torch.testing.assert_close(alone, together, rtol=1e-9, atol=1e-11)


@each
def test_state_dict_round_trip_copy_and_pickle(key):
    grid = home_grid(key)
    module, x = build(key, grid), tokens(grid)
    expected = module(x, grid)
    torch.manual_seed(99)
    other = fresh(key, grid).eval()
    other.load_state_dict(module.state_dict(), strict=True)
    for again in (other, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(again(x, grid), expected, rtol=0, atol=0)


@each
def test_evaluation_is_deterministic(key):
    grid = home_grid(key)
    module, x = build(key, grid), tokens(grid)
    first = module(x, grid)
    torch.manual_seed(7)
    assert torch.equal(module(x, grid), first)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_moves(key, dtype):
    grid = home_grid(key)
    module = build(key, grid).to(dtype)
    y = module(tokens(grid, dtype=dtype), grid)
    assert y.dtype == dtype
    assert y.isfinite().all()


@each
def test_no_parameter_is_hidden(key):
    module = build(key, home_grid(key))
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute.startswith("_") and attribute != "_parameters":
                continue
            items = value if isinstance(value, list | tuple) else [value]
            for item in items if not isinstance(value, dict) else ():
                hidden = isinstance(item, nn.Module) or (isinstance(item, Tensor) and item.requires_grad)
                assert not hidden, f"{name}.{attribute} is not registered"


@each
def test_repr_shows_the_options(key):
    module = core(build(key, home_grid(key)))
    assert "dim=" in module.extra_repr()


# Loops over what content decides, which run as they are between two graphs; all others are one graph.
IN_PARTS = ("a2mamba", "anchor_attention", "mhs_vm", "pyramid_sparse_attention", "seer_attention")


@each
def test_compiles_and_gives_the_same(key):
    grid = home_grid(key)
    module, x = build(key, grid), tokens(grid, batch=1)
    torch._dynamo.reset()
    whole = key in LAYERS and key not in IN_PARTS
    compiled = torch.compile(module, backend="aot_eager", fullgraph=whole)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, grid), module(x, grid), rtol=1e-4, atol=1e-5)
