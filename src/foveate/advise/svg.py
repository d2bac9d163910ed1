"""Small pieces for drawing charts as SVG text: scales, ticks, number words, label placement.

Colours are CSS variables of the page the picture stands in, so that one picture serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# Width of one character of the 11.5 px label face; labels only have to avoid one another, not be exact.
CHAR_PX = 6.3
LINE_PX = 14.0


def words(key: str) -> str:
    """A key as a reader would say it."""
    return key.replace("_", " ")


def number(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent for everyday sizes."""
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits + 3) or abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def milliseconds(value: float) -> str:
    """A duration with a unit that fits it."""
    if value >= 1000:
        return f"{number(value / 1000)} s"
    return f"{number(value)} ms" if value >= 0.1 else f"{number(value * 1000)} µs"


def byte_words(value: float) -> str:
    """A number of bytes with a unit that fits it."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{number(value)} {unit}"


def grid_words(sizes: Iterable[int]) -> str:
    """Grid sizes as people write them."""
    return "×".join(map(str, sizes))


def text(x: float, y: float, said: str, *, anchor: str = "start", cls: str = "tick", extra: str = "") -> str:
    """One text element."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{cls}"{extra}>{escape(said)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, cls: str) -> str:
    """One straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{cls}"/>'


def path(points: Sequence[tuple[float, float]], cls: str, extra: str = "") -> str:
    """A line through points."""
    steps = " ".join(f"{'L' if i else 'M'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return f'<path d="{steps}" class="{cls}"{extra}/>'


def figure(width: float, height: float, body: Iterable[str], *, label: str) -> str:
    """A whole picture that scales with its container and tells screen readers what it shows."""
    inside = "\n".join(body)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label, quote=True)}" '
        f'xmlns="http://www.w3.org/2000/svg">\n<title>{escape(label)}</title>\n{inside}\n</svg>'
    )


@dataclass(frozen=True)
class Scale:
    """Maps values `low..high` to pixels `start..stop`, linearly or by logarithm."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixels of a value."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    @classmethod
    def over(
        cls, values: Iterable[float], start: float, stop: float, *, log: bool = False, pad: float = 0.07
    ) -> Scale:
        """A scale that holds all values with some air at both ends."""
        kept = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(kept), max(kept)) if kept else (1.0, 2.0)
        if log:
            room = max((high / low) ** pad, 1.12)
            return cls(low / room, high * room, start, stop, True)
        room = (high - low) * pad or max(abs(high), 1.0) * pad
        return cls(low - room, high + room, start, stop)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Round values inside the range, about as many as wanted."""
        if self.log:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
                found = [s * 10.0**t for t in tens for s in steps if self.low <= s * 10.0**t <= self.high]
                if len(found) >= min(wanted, 3):
                    return found
            return found
        raw = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw)
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def byte_ticks(scale: Scale) -> list[float]:
    """Powers of two inside a logarithmic scale, about five of them."""
    low, high = math.ceil(math.log2(scale.low)), math.floor(math.log2(scale.high))
    step = max(1, round((high - low) / 5))
    return [2.0**p for p in range(high, low - 1, -step)]


@dataclass(frozen=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: _Box) -> float:
        """Area shared with another box."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0.0) * max(high, 0.0)


def place_labels(
    points: Sequence[tuple[float, float, str]], frame: tuple[float, float, float, float]
) -> list[tuple[float, float, str]]:
    """Choose where the label of each point stands, so that labels avoid points and one another.

    Args:
        points: x, y and label of each.
        frame: left, top, right, bottom that labels stay in.

    Returns:
        x, y (baseline) and text anchor of each label.
    """
    marks = [_Box(x - 6, y - 6, x + 6, y + 6) for x, y, _ in points]
    placed: list[_Box] = []
    out = []
    tries = [(10, 4, "start"), (-10, 4, "end"), (0, -11, "middle"), (0, 20, "middle")]
    tries += [(9, -8, "start"), (9, 16, "start"), (-9, -8, "end"), (-9, 16, "end")]
    tries += [(10, dy, "start") for dy in (28, -22)] + [(-10, dy, "end") for dy in (28, -22)]
    for i, (x, y, label) in enumerate(points):
        width = len(label) * CHAR_PX
        best = None
        for order, (dx, dy, anchor) in enumerate(tries):
            at = x + dx
            left = at - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
            box = _Box(left, y + dy - 10, left + width, y + dy + 3)
            outside = max(0.0, frame[0] - box.left) + max(0.0, box.right - frame[2])
            outside += max(0.0, frame[1] - box.top) + max(0.0, box.bottom - frame[3])
            cost = 40 * outside + sum(box.hits(other) for other in placed)
            cost += sum(box.hits(mark) for j, mark in enumerate(marks) if j != i) + order
            if best is None or cost < best[0]:
                best = cost, box, (at, y + dy, anchor)
        assert best is not None
        placed.append(best[1])
        out.append(best[2])
    return out


def spread_apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move heights apart to at least `gap`, keeping their order and, where there is room, the range."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    floor = low
    for i in order:
        placed[i] = max(wanted[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed
