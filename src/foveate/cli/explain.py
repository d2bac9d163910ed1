"""`foveate explain`: what an attention call would cost and who would run it, before anything runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.markup import escape

from foveate.cli.console import friendly, stdout
from foveate.core.errors import bad
from foveate.core.grid import Grid


def _per_axis(name: str, text: str | None) -> Any:
    """Read "13" or "13x7"; None stays None."""
    if text is None:
        return None
    try:
        sizes = tuple(int(part) for part in text.lower().replace("×", "x").replace(",", "x").split("x"))
    except ValueError:
        raise bad(name, text, "an integer such as 13, or one per axis such as 13x7") from None
    return sizes[0] if len(sizes) == 1 else sizes


@friendly
def explain(
    grid: Annotated[str, typer.Option(help="Token grid, such as 64x64, 4096 or 8x32x32.")] = "64x64",
    window: Annotated[
        str | None, typer.Option(help="Neighborhood such as 13 or 13x7; none: all keys.")
    ] = None,
    dilation: Annotated[str, typer.Option(help="Gap between keys, per axis or one for all.")] = "1",
    stride: Annotated[str, typer.Option(help="Queries that share a neighborhood.")] = "1",
    causal: Annotated[bool, typer.Option("--causal", help="No key after the query, on every axis.")] = False,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[int | None, typer.Option(help="Key and value heads; as many by default.")] = None,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    batch: Annotated[int, typer.Option(help="Samples.")] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    backend: Annotated[str, typer.Option(help="auto, or the backend that must run it.")] = "auto",
) -> None:
    """Explain an attention call: pairs, FLOPs, bytes, upper bound of the speed-up, backend and why."""
    from foveate.advise.settings import Settings, parse_grid
    from foveate.cost.explain import explain as run
    from foveate.patterns.basic import Causal
    from foveate.patterns.grids import Neighborhood

    sizes = Grid(*parse_grid(grid))
    for name, value in {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch}.items():
        if value is not None and value < 1:
            raise bad(name, value, "a positive integer")
    where: Any = None
    if window is not None:
        where = Neighborhood(
            sizes,
            _per_axis("window", window),
            dilation=_per_axis("dilation", dilation),
            stride=_per_axis("stride", stride),
            causal=causal,
        )
    elif causal:
        where = Causal()
    elif (dilation, stride) != ("1", "1"):
        raise bad("window", None, "a window when dilation or stride is given", "Add --window 13.")
    q = (batch, heads, sizes.numel, head_dim)
    k = (batch, kv_heads if kv_heads is not None else heads, sizes.numel, head_dim)
    kind = Settings(workloads=("shapes",), dtype=dtype).torch_dtype
    found = run(q, k, k, where=where, backend=backend, dtype=kind)
    stdout().print(escape(str(found)), soft_wrap=True)
