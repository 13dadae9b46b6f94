"""The few pieces of HTML that the demo's page is made of; every text is escaped here."""

from __future__ import annotations

import html
from collections.abc import Sequence

STYLE = """
:root { color-scheme: light dark; --ink: #1d1d24; --soft: #5c5c68; --paper: #ffffff;
  --line: #dcdce2; --card: #f6f6f8; --good: #1a7f37; --bad: #b3261e; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf1; --soft: #a3a3b0; --paper: #15151a;
  --line: #34343e; --card: #1e1e25; --good: #5cc879; --bad: #ff8a80; --link: #8ab8f0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { max-width: 44rem; margin: .5rem 0 1rem; }
a { color: var(--link); }
.soft { color: var(--soft); }
ul.checks { list-style: none; padding: 0; margin: 1rem 0; }
ul.checks li { padding: .55rem .8rem; margin: .4rem 0; background: var(--card);
  border-left: 4px solid var(--soft); border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
ul.checks li.good { border-color: var(--good); }
ul.checks li.bad { border-color: var(--bad); }
li.good b { color: var(--good); }
li.bad b { color: var(--bad); }
figure { margin: 1rem 0; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
.paper { background: #ffffff; padding: .5rem; }
.paper img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr));
  gap: .8rem; }
.panels figure { margin: 0; }
.panels img { width: 100%; height: auto; display: block; border: 1px solid var(--line);
  border-radius: 6px; background: #ffffff; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding: .6rem .7rem; font-size: .9rem; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-top: 1px solid var(--line); font-weight: normal; }
thead th { color: var(--soft); border-top: 0; }
th:first-child, td:first-child, th.left { text-align: left; }
tr.strong td, tr.strong th.left { font-weight: 600; }
tbody th { vertical-align: top; }
tbody th[scope=rowgroup] { white-space: normal; min-width: 7rem; max-width: 9rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def text(value: object) -> str:
    """Any value as escaped text."""
    return html.escape(str(value))


def document(title: str, body: str) -> str:
    """A whole page around its escaped parts."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def paragraph(words: str, soft: bool = False) -> str:
    """One paragraph of escaped words."""
    return f'<p class="soft">{text(words)}</p>' if soft else f"<p>{text(words)}</p>"


def heading(words: str, level: int = 2) -> str:
    """A heading."""
    return f"<h{level}>{text(words)}</h{level}>"


def links(label: str, files: Sequence[str]) -> str:
    """A line of links to files beside the page."""
    items = " · ".join(f'<a href="{text(name)}">{text(name)}</a>' for name in files)
    return f'<p class="soft">{text(label)} {items}</p>'


def picture(file: str, alt: str, least: int, caption: str = "") -> str:
    """A picture on white, never narrower than `least` pixels: small screens scroll it."""
    under = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><div class="scroll"><div class="paper" style="min-width:{int(least)}px">'
        f'<img src="{text(file)}" alt="{text(alt)}"></div></div>{under}</figure>'
    )


def panels(items: Sequence[tuple[str, str, str]]) -> str:
    """Small pictures side by side, as (file, alternative text, caption)."""
    cells = [
        f'<figure><img src="{text(file)}" alt="{text(alt)}">'
        f"<figcaption>{text(caption)}</figcaption></figure>"
        for file, alt, caption in items
    ]
    joined = "".join(cells)
    return f'<div class="panels">{joined}</div>'


def table(
    caption: str,
    columns: Sequence[str],
    groups: Sequence[tuple[str, Sequence[tuple[str, Sequence[str], bool]]]],
) -> str:
    """A table of groups of rows.

    Args:
      caption: what the table shows.
      columns: headings of all columns: the group's, the row's, those of the cells.
      groups: (name, rows), a row as (name, cells, whether to stress it).
    """
    head = "".join(
        f'<th scope="col" class="{"left" if number < 2 else "number"}">{text(words)}</th>'
        for number, words in enumerate(columns)
    )
    body = []
    for name, rows in groups:
        first = f'<th scope="rowgroup" class="left" rowspan="{len(rows)}">{text(name)}</th>'
        for row, cells, strong in rows:
            values = "".join(f"<td>{text(cell)}</td>" for cell in cells)
            body.append(
                f'<tr class="{"strong" if strong else "plain"}">{first}'
                f'<th scope="row" class="left">{text(row)}</th>{values}</tr>'
            )
            first = ""
    return (
        f'<div class="scroll"><table><caption>{text(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def pairs(items: Sequence[tuple[str, object]]) -> str:
    """A list of names and values."""
    rows = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in items)
    return f"<dl>{rows}</dl>"
