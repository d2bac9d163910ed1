"""`foveate recall`: what patterns and routers capture of full attention, for how many pairs."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from foveate.cli.console import friendly, stdout
from foveate.core.errors import bad

RESULTS = "recall.json"
PICTURES = ("recall.png", "recall.svg")
# What `--minilm` may be given instead of a text.
TOPICS = "topics"


def _texts(given: list[str]) -> list[str]:
    """Texts themselves, files of text, or Python's longest help topics."""
    from foveate.study.encoder import documentation

    found = []
    for text in given:
        if text == TOPICS:
            found += documentation(2)
        elif len(text) < 4096 and "\n" not in text and Path(text).is_file():
            found.append(Path(text).read_text(encoding="utf-8", errors="replace"))
        else:
            found.append(text)
    return found


def _source(
    file: Path | None,
    minilm: list[str],
    random: int | None,
    model: Path | None,
    heads: int,
    head_dim: int,
    seed: int,
) -> tuple[list[Any], str, dict[str, Any]]:
    """Read or make q, k, v; returns them, what they are in words, and what the file says about itself."""
    from foveate.study.maps import load_maps, random_maps

    named = {"FILE": file is not None, "--minilm": bool(minilm), "--random": random is not None}
    chosen = [name for name, given in named.items() if given]
    if len(chosen) != 1:
        hint = "For example: foveate recall --minilm topics, or foveate recall --random 4096"
        raise bad("source", ", ".join(chosen) or None, "one of FILE, --minilm and --random", hint)
    if file is not None:
        maps, said = load_maps(file)
        return maps, file.name, said
    if random is not None:
        maps = random_maps(random, heads=heads, head_dim=head_dim, seed=seed)
        return maps, "random normal q, k, v: attention without structure", {}
    from foveate.study.encoder import Encoder

    encoder = Encoder(model)
    maps = encoder.maps(_texts(minilm))
    name = "MiniLM" if model is None else model.name
    return maps, f"{name}, {encoder.layers} layers, {len(maps[0].q)} texts of {maps[0].n} tokens", {}


@friendly
def recall(
    file: Annotated[
        Path | None, typer.Argument(help="safetensors file with q, k, v, or <layer>.q, <layer>.k, <layer>.v.")
    ] = None,
    minilm: Annotated[
        list[str] | None,
        typer.Option(help="Text, text file, or 'topics' (Python's help), read by the MiniLM encoder."),
    ] = None,
    random: Annotated[int | None, typer.Option(help="Tokens of random q, k, v.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of another BERT model for --minilm; the installed one by default."),
    ] = None,
    grid: Annotated[
        str | None, typer.Option(help="Token grid, such as 64x64; a sequence by default.")
    ] = None,
    causal: Annotated[bool, typer.Option("--causal", help="No query sees a key after it.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also show every layer.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Only these families, such as 'window*'; may be repeated.")
    ] = None,
    budget: Annotated[
        list[float] | None, typer.Option(help="Share of the pairs to spend, such as 0.1; may be repeated.")
    ] = None,
    queries: Annotated[int | None, typer.Option(help="Queries per head that figures are taken on.")] = None,
    heads: Annotated[int, typer.Option(help="Heads of --random.")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels of a head of --random.")] = 64,
    seed: Annotated[int, typer.Option(help="Of random inputs and choices.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for recall.json and the pictures.")] = Path("recall"),
) -> None:
    """Measure how much of full attention's mass patterns and routers capture, for how many pairs."""
    from foveate.advise.settings import parse_grid
    from foveate.measure.fingerprint import fingerprint
    from foveate.measure.store import plain, write_atomically
    from foveate.study.candidates import BUDGETS
    from foveate.study.plot import save
    from foveate.study.recall import recall as run
    from foveate.study.table import layers_table, rich_table, sentences

    console = stdout()
    if minilm and causal:
        raise bad("causal", True, "False with --minilm", "The encoder attends both ways.")
    maps, source, said = _source(file, minilm or [], random, model, heads, head_dim, seed)
    with console.status("full attention") as status:
        found = run(
            maps,
            grid=said.get("grid") if grid is None else parse_grid(grid),
            causal=causal or said.get("causal", False),
            budgets=budget or BUDGETS,
            only=only,
            queries=queries,
            seed=seed,
            listener=lambda phrase: status.update(escape(phrase)),
        )
    sizes = found.settings
    title = (
        f"[bold]recall[/]: {escape(source)}  \\[{sizes['tokens']} tokens, {sizes['heads']} heads, "
        f"d {sizes['head_dim']}{', causal' if sizes['causal'] else ''}]"
    )
    whole = found.mean()
    console.print(rich_table(whole, title, width=console.width))
    if layers and len(found.layers) > 1:
        console.print(layers_table(found, width=console.width))
    for reason in dict.fromkeys(found.refused.values()):
        names = ", ".join(name for name, why in found.refused.items() if why == reason)
        console.print(f"[dim]left out: {escape(names)}. {escape(reason)}[/]", soft_wrap=True)
    for sentence in sentences(whole):
        console.print(f"- {escape(sentence)}", soft_wrap=True)
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    document = found.to_dict() | {
        "created": created,
        "source": source,
        "fingerprint": fingerprint().as_dict(),
    }
    write_atomically(out / RESULTS, json.dumps(plain(document), indent=1, allow_nan=False) + "\n")
    console.print(f"results  {escape(str(out / RESULTS))}", soft_wrap=True)
    for name in PICTURES:
        console.print(f"picture  {escape(str(save(found, out / name, source)))}", soft_wrap=True)
