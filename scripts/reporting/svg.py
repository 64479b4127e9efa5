"""A small writer of SVG plots: linear axes, lines, bars and marks, in colours that the page chooses.

Coordinates are data's; sizes are pixels. Colours are CSS variables, so that light and dark are the page's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

Range = tuple[float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two ends, some ``about`` of them."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / max(about, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]


def padded(values: Iterable[float], include: Sequence[float] = ()) -> Range:
    """The range of finite values with some room on both sides."""
    finite = [v for v in (*values, *include) if math.isfinite(v)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 1.0)
    room = 0.06 * ((high - low) or max(abs(high), 1.0))
    return low - room, high + room


def plain(value: float) -> str:
    """A tick's label without needless zeros."""
    return f"{value:.6g}".replace("-", "−")


class Plot:
    """One plot. ``x`` and ``y`` are the ends of the axes; ``title`` is read to those who cannot see it."""

    def __init__(
        self,
        title: str,
        x: Range,
        y: Range,
        size: tuple[int, int] = (560, 300),
        margins: tuple[int, int, int, int] = (14, 16, 44, 62),
    ) -> None:
        self.title, self.x, self.y, self.size = title, x, y, size
        self.top, self.right, self.bottom, self.left = margins
        self.parts: list[str] = []

    def px(self, x: float) -> float:
        """The pixel of a data coordinate."""
        share = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        return round(self.left + share * (self.size[0] - self.left - self.right), 2)

    def py(self, y: float) -> float:
        """The pixel of a data coordinate; larger values are higher."""
        share = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return round(self.size[1] - self.bottom - share * (self.size[1] - self.top - self.bottom), 2)

    def axes(
        self,
        xlabel: str = "",
        ylabel: str = "",
        xticks: Sequence[float] | None = None,
        yticks: Sequence[float] | None = None,
    ) -> Plot:
        """Draw the grid, the ticks and the names of the axes."""
        x0, x1, y0, y1 = self.px(self.x[0]), self.px(self.x[1]), self.py(self.y[0]), self.py(self.y[1])
        for value in ticks(*self.y) if yticks is None else yticks:
            at = self.py(value)
            self.parts.append(f'<line class="grid" x1="{x0}" x2="{x1}" y1="{at}" y2="{at}"/>')
            self.text(x0 - 8, at + 4, plain(value), "end")
        for value in ticks(*self.x) if xticks is None else xticks:
            at = self.px(value)
            self.parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{y0}" y2="{y1}"/>')
            self.text(at, y0 + 17, plain(value), "middle")
        if xlabel:
            self.text((x0 + x1) / 2, self.size[1] - 6, xlabel, "middle", "axis")
        if ylabel:
            middle = (y0 + y1) / 2
            self.parts.append(
                f'<text class="axis" text-anchor="middle" transform="translate(13 {middle}) rotate(-90)">'
                f"{escape(ylabel)}</text>"
            )
        return self

    def text(self, x: float, y: float, text: str, anchor: str = "start", css: str = "tick") -> None:
        """Write at a pixel."""
        self.parts.append(
            f'<text class="{css}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def line(self, points: Iterable[tuple[float, float]], colour: str, dash: str = "", tip: str = "") -> None:
        """A line through the finite points."""
        path = " ".join(f"{self.px(x):g},{self.py(y):g}" for x, y in points if math.isfinite(y))
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<polyline class="line" points="{path}"{_style(colour)}{dashed}>{_tip(tip)}</polyline>'
        )

    def marks(self, points: Iterable[tuple[float, float]], colour: str, tips: Sequence[str] = ()) -> None:
        """A dot at each finite point."""
        for index, (x, y) in enumerate(points):
            if math.isfinite(y):
                tip = _tip(tips[index]) if tips else ""
                self.parts.append(
                    f'<circle class="mark" cx="{self.px(x)}" cy="{self.py(y)}" r="3.2"{_style(colour)}>'
                    f"{tip}</circle>"
                )

    def box(self, x: Range, y: Range, colour: str, tip: str = "", css: str = "bar") -> None:
        """A filled rectangle between two data corners."""
        left, right = sorted((self.px(x[0]), self.px(x[1])))
        high, low = sorted((self.py(y[0]), self.py(y[1])))
        self.parts.append(
            f'<rect class="{css}" x="{left:g}" y="{high:g}" width="{max(right - left, 0.4):g}" '
            f'height="{max(low - high, 0.4):g}"{_style(colour)}>{_tip(tip)}</rect>'
        )

    def rule(self, *, x: float | None = None, y: float | None = None, css: str = "zero") -> None:
        """A straight line across the plot at one value."""
        ends = (
            (self.px(x), self.px(x), self.py(self.y[0]), self.py(self.y[1]))
            if x is not None
            else (self.px(self.x[0]), self.px(self.x[1]), self.py(y or 0.0), self.py(y or 0.0))
        )
        self.parts.append('<line class="{}" x1="{:g}" x2="{:g}" y1="{:g}" y2="{:g}"/>'.format(css, *ends))

    def svg(self) -> str:
        """The picture as an element of HTML."""
        width, height = self.size
        body = "\n".join(self.parts)
        return (
            f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(self.title)}">\n{body}\n</svg>'
        )


def _style(colour: str) -> str:
    return f' style="--c: var(--{colour})"'


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
