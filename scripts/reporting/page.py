"""The page: its style, and the few elements that sections are made of. It needs no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from scripts.reporting.charts import colour
from scripts.reporting.pictures import Strip

_STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")


def html_page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The page from (anchor, heading, body) sections; light or dark as the reader's system is."""
    links = "".join(f'<a href="#{anchor}">{escape(heading)}</a>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section id="{anchor}">\n<h2>{escape(heading)}</h2>\n{content}\n</section>'
        for anchor, heading, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{lead}\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def paragraph(text: str) -> str:
    """Text that is HTML already."""
    return f"<p>{text}</p>"


def figure(chart: str, caption: str = "", legend: str = "") -> str:
    """A chart with its legend above and its caption below."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{legend}{chart}{below}</figure>"


def charts(*figures: str) -> str:
    """Figures beside each other where there is room."""
    return f'<div class="charts">{"".join(figures)}</div>'


def legend(names: Mapping[str, str]) -> str:
    """What the colours mean; ``names[name]`` is a CSS variable."""
    items = "".join(
        f'<span><i style="--c: var(--{variable})"></i>{escape(name)}</span>'
        for name, variable in names.items()
    )
    return f'<div class="legend">{items}</div>'


def rule_legend(rules: Sequence[str]) -> str:
    """What the colours of rules mean."""
    return legend({rule: colour(rule) for rule in rules})


def card(what: str, number: str, below: str, variable: str) -> str:
    """A number to see first."""
    return (
        f'<div class="card" style="--c: var(--{variable})"><div class="what">{escape(what)}</div>'
        f'<div class="number">{escape(number)}</div><div class="range">{escape(below)}</div></div>'
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], css: str = "") -> str:
    """A table of HTML cells; a row of one cell is a heading inside it."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for row in rows:
        if len(row) == 1:
            lines.append(
                f'<tr class="group"><th scope="rowgroup" colspan="{len(head) or 2}">{row[0]}</th></tr>'
            )
        else:
            cells = "".join(f"<td>{cell}</td>" for cell in row[1:])
            lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{css}">{thead}<tbody>{"".join(lines)}</tbody></table></div>'


def signed(value: float) -> str:
    """A difference in points, coloured by its sign."""
    css = "none" if abs(value) < 0.005 else "gain" if value > 0 else "loss"
    return f'<span class="{css}">{value:+.2f}</span>'.replace("-", "−")


def strip(picture: Strip) -> str:
    """An image of the split: its tiles beside each other, each rule with its Dice."""
    cells = []
    for title, uri in picture.tiles.items():
        score = picture.dice.get(title)
        name = escape(title) if score is None else f"{escape(title)} <b>{score:.1f}</b>"
        alt = escape(f"{picture.name}: {title}")
        cells.append(f'<figure><img src="{uri}" alt="{alt}"><figcaption>{name}</figcaption></figure>')
    return (
        f'<div class="strip-name">{escape(picture.name)}</div>'
        f'<div class="strip" style="--n: {len(cells)}">{"".join(cells)}</div>'
    )
