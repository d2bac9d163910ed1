"""The pictures of the report, drawn from rows of results.json as plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

from foveate.advise.ranking import pareto as undominated
from foveate.advise.svg import (
    CHAR_PX,
    Scale,
    byte_ticks,
    byte_words,
    figure,
    grid_words,
    line,
    milliseconds,
    number,
    path,
    place_labels,
    spread_apart,
    text,
    words,
)

Row = Mapping[str, Any]
BASELINE = "full_attention"
FAMILIES = ("local", "routed", "linear", "scored", "gated", "baseline")


def family_class(row: Row) -> str:
    """The CSS class that colours a mechanism by its family."""
    family = row.get("family")
    return f"fam-{family if family in FAMILIES else 'other'}"


def _marked(row: Row, best: str | None) -> str:
    """CSS classes of a mechanism's mark or label."""
    return family_class(row) + (" best" if row["mechanism"] == best else "")


def _axes(
    x: Scale, y: Scale, *, x_name: str, y_name: str, x_word, y_word, x_ticks=None, y_ticks=None
) -> list[str]:
    body = []
    for value in y.ticks() if y_ticks is None else y_ticks:
        at = y(value)
        body += [
            line(x.start, at, x.stop, at, "grid"),
            text(x.start - 8, at + 4, y_word(value), anchor="end"),
        ]
    for value in x.ticks() if x_ticks is None else x_ticks:
        at = x(value)
        body += [
            line(at, y.start, at, y.start + 5, "axis"),
            text(at, y.start + 19, x_word(value), anchor="middle"),
        ]
    body.append(line(x.start, y.start, x.stop, y.start, "axis"))
    body.append(text((x.start + x.stop) / 2, y.start + 40, x_name, anchor="middle", cls="name"))
    body.append(text(x.start - 8, y.stop - 16, y_name, cls="name"))
    return body


def pareto(
    rows: Sequence[Row],
    *,
    info: Mapping[str, Any],
    best: str | None,
    against: Literal["time", "state"] = "time",
) -> str:
    """Quality against what it costs, with error bars, the trivial answer and the front.

    Args:
        rows: measured rows of one learning workload.
        info: that workload's record (metric, higher_is_better, baselines, floor).
        best: the recommended mechanism.
        against: "time" of a training step, or bytes of the "state" that decoding keeps.
    """
    field, said, word, unit = {
        "time": ("step_ms", "time of one training step (forward + backward)", milliseconds, " a step"),
        "state": ("state_bytes", "bytes that decoding keeps of one sample", byte_words, " kept for decoding"),
    }[against]
    rows = [r for r in rows if r.get("quality") is not None and r.get(field)]
    width, height, left, right, top, bottom = 1000.0, 440.0, 70.0, 970.0, 44.0, 380.0
    up = bool(info.get("higher_is_better", True))
    floor = info.get("floor")
    values = [r["quality"] + s * 2 * (r.get("quality_se") or 0) for r in rows for s in (-1, 1)]
    y = Scale.over([*values, *([floor] if floor is not None else [])], bottom, top)
    x = Scale.over([r[field] for r in rows], left, right, log=True, pad=0.12)
    metric = str(info.get("metric", "quality")) + ("" if up else " (lower is better)")
    body = _axes(
        x,
        y,
        x_name=f"{said}, logarithmic",
        y_name=metric,
        x_word=word,
        y_word=number,
        x_ticks=byte_ticks(x) if against == "state" else None,
    )
    if floor is not None:
        body.append(line(left, y(floor), right, y(floor), "floor"))
        trivial = f"best trivial answer: {words(str(info.get('floor_name', '')))} {number(floor)}"
        body.append(text(right, y(floor) - 6, trivial, anchor="end", cls="tick"))
    sure = [r for r in rows if r.get("resolved") is not False]
    front = [sure[i] for i in undominated([(r[field], r["quality"]) for r in sure], higher_is_better=up)]
    front.sort(key=lambda r: r[field])
    steps: list[tuple[float, float]] = []
    for row in front:
        if steps:
            steps.append((x(row[field]), steps[-1][1]))
        steps.append((x(row[field]), y(row["quality"])))
    if steps:
        body.append(path([*steps, (right, steps[-1][1])], "front"))
    spots = [(x(r[field]), y(r["quality"]), words(r["mechanism"])) for r in rows]
    for row, (cx, cy, _) in zip(rows, spots, strict=True):
        se = 2 * (row.get("quality_se") or 0)
        if se:
            body.append(
                line(cx, y(row["quality"] - se), cx, y(row["quality"] + se), f"err {family_class(row)}")
            )
        tip = (
            f"{row['mechanism']}: {number(row['quality'])} ± {number(row.get('quality_se') or 0)} "
            f"at {word(row[field])}{unit}"
        )
        radius = 8 if row["mechanism"] == best else 6
        hollow = " hollow" if row.get("resolved") is False else ""
        body.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" class="dot {_marked(row, best)}{hollow}">'
            f"<title>{escape(tip)}</title></circle>"
        )
    for row, (lx, ly, anchor), (_, _, label) in zip(
        rows, place_labels(spots, (left, top - 10, right + 20, bottom)), spots, strict=True
    ):
        body.append(text(lx, ly, label, anchor=anchor, cls=f"label {_marked(row, best)}"))
    return figure(width, height, body, label=f"{metric} against {said}")


def curves(rows: Sequence[Row], *, info: Mapping[str, Any], best: str | None) -> str:
    """Quality as training goes on, against seconds: what each would have reached in equal time.

    Args:
        rows: measured rows of one learning workload, with `curve`.
        info: that workload's record.
        best: the recommended mechanism.
    """
    lines = {r["mechanism"]: [(p[1], p[2]) for p in r.get("curve") or [] if p[1] > 0] for r in rows}
    lines = {key: points for key, points in lines.items() if points}
    width, height, left, top, bottom = 520.0, 330.0, 52.0, 40.0, 276.0
    right = width - 14
    floor = info.get("floor")
    flat = [p for points in lines.values() for p in points]
    x = Scale.over([s for s, _ in flat], left, right, log=True, pad=0.02)
    y = Scale.over([q for _, q in flat] + ([floor] if floor is not None else []), bottom, top)
    body = _axes(
        x,
        y,
        x_name="training seconds of one seed, logarithmic",
        y_name=str(info.get("metric", "quality")),
        x_word=lambda s: milliseconds(s * 1000),
        y_word=number,
    )
    if floor is not None:
        body.append(line(left, y(floor), right, y(floor), "floor"))
    by_key = {r["mechanism"]: r for r in rows}
    for key in sorted(lines, key=lambda k: (k == best, k == BASELINE)):
        cls = _marked(by_key[key], best)
        pixels = [(x(s), y(q)) for s, q in lines[key]]
        end = f"{key}: {number(lines[key][-1][1])} after {number(lines[key][-1][0])} s"
        body.append(path(pixels, f"curve {cls}"))
        body.append(
            f'<circle cx="{pixels[-1][0]:.1f}" cy="{pixels[-1][1]:.1f}" r="3.6" class="dot {cls}">'
            f"<title>{escape(end)}</title></circle>"
        )
    return figure(width, height, body, label="quality against seconds of training")


def scaling(rows: Sequence[Row], *, measure: str, best: str | None) -> str:
    """Growth with the number of tokens, one line per mechanism, the dense baseline drawn strongest.

    Args:
        rows: measured rows of `shapes`, each with `points`.
        measure: "time" (forward + backward) or "memory".
        best: the recommended mechanism.
    """

    def value(point: Mapping[str, Any]) -> float | None:
        if measure == "memory":
            return point.get("memory_bytes")
        if point.get("forward_ms") is None or point.get("backward_ms") is None:
            return None
        return point["forward_ms"] + point["backward_ms"]

    lines = {r["mechanism"]: [(p["tokens"], value(p), p) for p in r.get("points") or []] for r in rows}
    lines = {k: [(n, v, p) for n, v, p in pts if v] for k, pts in lines.items()}
    lines = {k: pts for k, pts in lines.items() if pts}
    longest = max((len(words(k)) + 6 for k in lines), default=10)
    width, height, left, top, bottom = 1000.0, 460.0, 70.0, 44.0, 400.0
    right = width - longest * CHAR_PX - 16
    flat = [(n, v) for pts in lines.values() for n, v, _ in pts]
    x = Scale.over([n for n, _ in flat], left, right, log=True, pad=0.0)
    y = Scale.over([v for _, v in flat], bottom, top, log=True, pad=0.04)
    by_size = {n: p["grid"] for pts in lines.values() for n, _, p in pts}
    body = _axes(
        x,
        y,
        x_name="tokens",
        y_name="peak memory" if measure == "memory" else "forward + backward",
        x_word=lambda n: f"{n:,.0f}",
        y_word=byte_words if measure == "memory" else milliseconds,
        x_ticks=sorted(by_size),
        y_ticks=byte_ticks(y) if measure == "memory" else None,
    )
    by_key = {r["mechanism"]: r for r in rows}
    order = sorted(lines, key=lambda k: (k == best, k == BASELINE))
    ends = [y(lines[k][-1][1]) for k in order]
    heights = spread_apart(ends, 15.0, top, bottom)
    for key, end, at in zip(order, ends, heights, strict=True):
        row, pts = by_key[key], lines[key]
        cls = _marked(row, best)
        body.append(path([(x(n), y(v)) for n, v, _ in pts], f"curve {cls}"))
        for n, v, p in pts:
            shown = byte_words(v) if measure == "memory" else milliseconds(v)
            tip = f"{key} at {grid_words(p['grid'])}: {shown}"
            body.append(
                f'<circle cx="{x(n):.1f}" cy="{y(v):.1f}" r="3.2" class="dot {cls}">'
                f"<title>{escape(tip)}</title></circle>"
            )
        body.append(line(x(pts[-1][0]) + 5, end, right + 10, at, "leader"))
        raised = ""
        if measure == "time" and row.get("exponent") is not None:
            raised = f' N<tspan dy="-4" class="power">{row["exponent"]:.2f}</tspan>'
        body.append(
            f'<text x="{right + 13:.1f}" y="{at + 4:.1f}" class="label {cls}">'
            f"{escape(words(key))}{raised}</text>"
        )
    return figure(width, height, body, label=f"{measure} against number of tokens")


def bars(rows: Sequence[Row], *, field: str, best: str | None, word=byte_words, label: str) -> str:
    """Horizontal bars of one field, smallest first, the dense baseline's value marked through all.

    Args:
        rows: measured rows of one workload.
        field: the field drawn.
        best: the recommended mechanism.
        word: writes a value.
        label: what is shown.
    """
    rows = sorted((r for r in rows if r.get(field)), key=lambda r: r[field])
    pitch, left, width = 25.0, 206.0, 530.0
    right = width - 70
    top = 8.0
    height = top + pitch * len(rows) + 8
    most = max((r[field] for r in rows), default=1.0)
    x = Scale(0.0, most, left, right)
    body = []
    for i, row in enumerate(rows):
        at = top + i * pitch
        cls = _marked(row, best)
        long = max(x(row[field]) - left, 1.5)
        tip = escape(f"{row['mechanism']}: {word(row[field])}")
        body.append(text(left - 10, at + 16, words(row["mechanism"]), anchor="end", cls=f"label {cls}"))
        body.append(
            f'<rect x="{left}" y="{at + 4:.1f}" width="{long:.1f}" height="{pitch - 9:.1f}" rx="3" '
            f'class="bar {cls}"><title>{tip}</title></rect>'
        )
        body.append(text(left + long + 7, at + 16, word(row[field])))
    dense = next((r for r in rows if r["mechanism"] == BASELINE), None)
    if dense is not None:
        body.append(line(x(dense[field]), top, x(dense[field]), height - 6, "floor"))
    return figure(width, height, body, label=label)


def prediction(rows: Sequence[Row], *, best: str | None) -> str:
    """Measured speed-up over dense attention as a bar, the bound its arithmetic would allow as a tick.

    Args:
        rows: measured rows of `shapes`.
        best: the recommended mechanism.
    """
    rows = [
        r for r in rows if r.get("speedup_forward") and r.get("speedup_bound") and r["mechanism"] != BASELINE
    ]
    rows = sorted(rows, key=lambda r: -r["speedup_forward"])
    pitch, left, width = 25.0, 206.0, 530.0
    right = width - 24
    top, high = 8.0, 25.0 * len(rows)
    values = [v for r in rows for v in (r["speedup_forward"], r["speedup_bound"])]
    x = Scale.over([*values, 1.0], left, right, log=True, pad=0.04)
    body = []
    for value in x.ticks():
        body += [
            line(x(value), top, x(value), top + high, "grid"),
            text(x(value), top + high + 18, f"{number(value)}×", anchor="middle"),
        ]
    for i, row in enumerate(rows):
        at = top + i * pitch
        cls = _marked(row, best)
        here, bound = x(row["speedup_forward"]), x(row["speedup_bound"])
        low, far = min(here, x(1.0)), max(here, x(1.0))
        tip = escape(
            f"{row['mechanism']}: measured {number(row['speedup_forward'])}×, "
            f"its arithmetic allows {number(row['speedup_bound'])}×"
        )
        body += [
            text(left - 10, at + 16, words(row["mechanism"]), anchor="end", cls=f"label {cls}"),
            line(here, at + 12, bound, at + 12, "gap"),
            f'<rect x="{low:.1f}" y="{at + 5:.1f}" width="{max(far - low, 1.5):.1f}" '
            f'height="{pitch - 11:.1f}" rx="3" class="bar {cls}"><title>{tip}</title></rect>',
            line(bound, at + 3, bound, at + pitch - 4, "bound"),
        ]
    body.append(line(x(1.0), top, x(1.0), top + high, "axis"))
    said = "speed-up over full attention: bar measured, tick possible"
    body.append(text(width / 2, top + high + 38, said, anchor="middle", cls="name"))
    return figure(width, top + high + 48, body, label="measured speed-up beside the bound")
