import pytest
import torch

from foveate.advise.settings import Settings, Shape, default_budget, parse_grid
from foveate.core.grid import Grid


def test_ladder_rises_to_the_users_grid():
    for grid in ((64, 64), (4096,), (8, 32, 32), (50, 20), (7,), (16, 16)):
        ladder = Shape(grid=grid).ladder()
        assert ladder[-1] == Grid(*grid)
        tokens = [g.numel for g in ladder]
        assert tokens == sorted(set(tokens))
        assert all(g.ndim == len(grid) for g in ladder)
    assert [g.sizes for g in Shape().ladder()] == [(16, 16), (24, 24), (40, 40), (64, 64)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ()}, "workloads"),
        ({"workloads": ("imag",)}, "Did you mean 'image'"),
        ({"mechanisms": ("swim",)}, "Did you mean"),
        ({"budget_s": 0}, "budget: expected a positive number"),
        ({"dtype": "float"}, "dtype: expected one of"),
        ({"threads": 0}, "threads: expected a positive integer"),
        ({"device": "gpu"}, "device: expected a torch device"),
        ({"data": "/no/such/folder"}, "data: expected an existing folder"),
    ],
)
def test_bad_settings_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Settings(**options)


def test_data_must_fit_a_workload(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("x")
    with pytest.raises(ValueError, match="--workload text"):
        Settings(workloads=("image",), data=str(file))
    with pytest.raises(ValueError, match="--workload image"):
        Settings(workloads=("text",), data=str(tmp_path))
    found = Settings(workloads=("text", "image"), data=str(file))
    assert found.workload_options("text") == {"file": file}
    assert found.workload_options("image") == {}


def test_the_baseline_always_takes_part():
    keys = [facts.key for facts in Settings(mechanisms=("swin",)).systems()]
    assert keys == ["swin", "full_attention"]
    assert "swin" in [facts.key for facts in Settings().systems()]


def test_conflicts_with_a_stored_run():
    settings = Settings()
    assert settings.conflict(settings.as_dict()) == ""
    assert "seed=1" in settings.conflict(settings.as_dict() | {"seed": 1})


def test_parse_grid():
    assert parse_grid("64x32") == parse_grid("64,32") == parse_grid((64, 32)) == (64, 32)
    assert parse_grid("4096") == (4096,)
    for wrong in ("a", "64x", "0x4", "2x2x2x2"):
        with pytest.raises(ValueError, match=r"grid|Grid"):
            parse_grid(wrong)


def test_dtypes():
    assert Settings(dtype="bf16").torch_dtype is torch.bfloat16


@pytest.mark.parametrize("field", ["heads", "head_dim", "batch"])
def test_shape_is_checked(field):
    with pytest.raises(ValueError, match=field):
        Shape(**{field: 0})


def test_families_and_wildcards_name_mechanisms():
    local = Settings(mechanisms=("local", "swin", "sig*")).mechanisms
    assert local is not None
    assert {"swin", "fused_neighborhood_attention", "sigmoid_attention"} <= set(local)
    assert len(local) == len(set(local))
    assert "biformer" not in local
    with pytest.raises(ValueError, match="nothing_like_"):
        Settings(mechanisms=("nothing_like_*",))


def test_more_mechanisms_get_more_time():
    assert Settings(mechanisms=("swin",)).seconds == 270
    assert default_budget(16) == 270 < default_budget(17)
    assert default_budget(20, 5) > default_budget(20, 2)
    assert Settings(budget_s=3.0).seconds == 3.0
