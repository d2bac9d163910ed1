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
    simulate: Annotated[
        bool,
        typer.Option(
            "--simulate",
            help="Instead: which strides of the neighborhood line up with tiles of queries and keys, and the "
            "speed-up each is bound by. Looks for strides, or judges the one given; heads, dtype and backend "
            "do not count.",
        ),
    ] = False,
    tile_q: Annotated[
        str | None, typer.Option(help="With --simulate: queries of a tile, such as 16x8; none: all shapes.")
    ] = None,
    tile_k: Annotated[str | None, typer.Option(help="With --simulate: keys of a tile, such as 16x8.")] = None,
    mechanism: Annotated[
        str | None,
        typer.Option(
            help="Instead: a system that scans, such as lightning_attention; its state, FLOPs per token and the "
            "length from which full attention costs more. Only grid, heads, head-dim and dtype count."
        ),
    ] = None,
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
    kind = Settings(workloads=("shapes",), dtype=dtype).torch_dtype
    if mechanism is not None:
        given = {
            "window": window,
            "kv_heads": kv_heads,
            "causal": causal or None,
            "simulate": simulate or None,
        }
        for name, value in given.items():
            if value is not None:
                raise bad(name, value, f"nothing beside --mechanism {mechanism}", "Leave one of the two out.")
        from foveate.cost.linear import explain_linear

        cost = explain_linear(mechanism, dim=heads * head_dim, grid=sizes, heads=heads, dtype=kind)
        stdout().print(escape(str(cost)), soft_wrap=True)
        return
    where: Any = None
    if simulate and window is None:
        raise bad("window", None, "a window with --simulate", "Add --window 13.")
    for name, value in {"tile_q": tile_q, "tile_k": tile_k}.items():
        if value is not None and not simulate:
            raise bad(name, value, "no tile without --simulate", "Add --simulate.")
    if (tile_q is None) != (tile_k is None):
        raise bad("tile_q, tile_k", (tile_q, tile_k), "both --tile-q and --tile-k, or neither")
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
    if simulate:
        _simulate(where, stride != "1", _per_axis("tile_q", tile_q), _per_axis("tile_k", tile_k))
        return
    q = (batch, heads, sizes.numel, head_dim)
    k = (batch, kv_heads if kv_heads is not None else heads, sizes.numel, head_dim)
    found = run(q, k, k, where=where, backend=backend, dtype=kind)
    stdout().print(escape(str(found)), soft_wrap=True)


def _simulate(where: Any, judge: bool, query_tile: Any, key_tile: Any) -> None:
    from foveate.cost.simulate import as_rich, in_reach, worth_choosing

    found = worth_choosing(where, query_tile=query_tile, key_tile=key_tile, any_stride=not judge)
    stdout().print(escape(in_reach(where)), soft_wrap=True)
    stdout().print(as_rich(found))
    stdout().print("bound: of the speed-up over dense attention in the same tiles.", soft_wrap=True)
    stdout().print("fully block-sparse: every tile that is visited is needed entirely.", soft_wrap=True)
