"""Pieces of HTML pages that open offline and load nothing from the network.

python -c "from sftlab import pages; print(pages.table(('a', 'b'), [(1, 2)]))"
"""

import html
import json
from base64 import b64encode
from dataclasses import dataclass, field
from pathlib import Path

from sftlab import files
from sftlab.errors import UserError, place_error

STYLE = """:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem;overflow-wrap:break-word}
table{border-collapse:collapse;margin:.5rem 0}.wide{overflow-x:auto}
th,td{text-align:left;padding:.3rem .8rem;border-bottom:1px solid #8886}
pre{overflow-x:auto;padding:.7rem;border:1px solid #8886;border-radius:4px;font-size:.85rem;white-space:pre-wrap}
.note{color:#787878}.bad{font-weight:bold;color:#D55E00}img{max-width:100%}
section{margin-top:2rem}@media print{section{break-inside:avoid}}"""


def text(value) -> str:
    """A value as text that is safe inside HTML."""
    return html.escape(str(value))


def table(heads, rows) -> str:
    """A table; rows are sequences of values, or one string of ready-made <tr> elements."""
    cells = "".join(f'<th scope="col">{text(head)}</th>' for head in heads)
    if not isinstance(rows, str):
        rows = "".join("<tr>" + "".join(f"<td>{text(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{cells}</tr>{rows}</table></div>'


def picture(fig) -> str:
    """A plotly figure as a PNG inside the page, its numbers in words beside it."""
    from sftlab.plots import draw_static, summarise

    return f'<img alt="{text(summarise(fig))}" src="data:image/png;base64,{b64encode(draw_static(fig)).decode()}">'


def write(path: Path, title: str, parts: list[str], script: str = "", meta: str = "") -> None:
    """Write a page of these parts aside and rename it. `script`: a file beside the page that it loads; `meta`: more for its head."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">' + meta
    head += f"<title>{text(title)}</title><style>{STYLE}</style>"
    head += f'<script src="{text(script)}"></script>' if script else ""
    body = "\n".join(parts)
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
    files.write_text(path, page)


# A report of sections, tables and charts as one HTML file.
#
# The page is alone: plotly.js is inside, once, and nothing is loaded. On paper, and without JavaScript, each chart is a
# picture; the tables beside it hold its numbers.


MARK = "made by sftlab report"  # what a file must hold to be replaced unasked
# The browser itself refuses to load anything, whatever a script in the page asks for.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
REPORT_STYLE = """<style>body{max-width:72rem}caption{text-align:left;font-weight:bold;padding:.3rem 0}
table{font-size:.9rem}th,td{padding:.3rem .6rem}tbody th{white-space:nowrap}
td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}td.words{text-align:left;white-space:normal;min-width:10rem}
thead th:not(:first-child){text-align:right}thead th.words{text-align:left!important}thead th{vertical-align:bottom}tbody th{font-weight:normal}
.modelled table{outline:2px dashed #8888;outline-offset:3px}.modelled td,.modelled tbody th{font-style:italic}
figure{margin:1rem 0}figcaption{color:#787878}.live{display:none}
@media screen{.drawn img{display:none}.drawn .live{display:block}}
@page{size:A4 landscape;margin:12mm}
@media print{body{max-width:none;font-size:11px;padding:0}h2,caption{break-after:avoid}section{break-inside:auto}.page{break-before:page}
tr,figure{break-inside:avoid}.wide{overflow:visible}thead{display:table-header-group}figure img{max-width:15cm}}</style>"""
DRAW = """<script>for (const figure of document.querySelectorAll("figure.chart")) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  figure.classList.add("drawn");
  Plotly.newPlot(figure.querySelector(".live"), spec.data, spec.layout, {responsive: true, displayModeBar: false});
}</script>"""


@dataclass(frozen=True)
class Table:
    """Cells are text. The first column names the row; `words`: numbers of the columns that hold sentences."""

    heads: tuple
    rows: list
    caption: str = ""
    words: tuple = ()
    modelled: bool = False


@dataclass(frozen=True)
class Chart:
    """A plotly figure, and a sentence below it."""

    fig: object
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it: paragraphs (str), lists (list of str), tables, charts. `page`: on a new page."""

    title: str
    blocks: list = field(default_factory=list)
    page: bool = False


def to_html(title: str, sections: list[Section]) -> list[str]:
    """The parts of the page's body."""
    from plotly.offline import get_plotlyjs

    parts = [REPORT_STYLE, f"<!-- {MARK} -->", f"<h1>{text(title)}</h1>"]
    for section in sections:
        kind = ' class="page"' if section.page else ""
        parts += [f"<section{kind}><h2>{text(section.title)}</h2>", *map(html_block, section.blocks), "</section>"]
    if any(isinstance(block, Chart) for section in sections for block in section.blocks):
        parts += [f"<script>{get_plotlyjs()}</script>", DRAW]
    return parts


def html_block(block) -> str:
    if isinstance(block, Table):
        return html_table(block)
    if isinstance(block, Chart):
        from sftlab.plots import summarise

        spec = json.loads(block.fig.to_json())
        rows = -(-len(spec["data"]) // 2)  # of the legend, below the chart, where on a phone it may take more
        title = spec["layout"].pop("title", {}).get("text") or ""  # plotly would cut it on a phone
        spec["layout"] |= {"height": 380 + 24 * rows, "margin": {"l": 60, "r": 20, "t": 20, "b": 80 + 24 * rows}}
        spec["layout"]["legend"] = {"orientation": "h", "x": 0, "y": -60 / 280, "yanchor": "top"}
        spec = json.dumps(spec).replace("<", "\\u003c")  # no text in it can end the script
        live = f'<div class="live" role="img" aria-label="{text(summarise(block.fig))}"></div>'
        data = f'<script type="application/json">{spec}</script>'
        words = f"{title}. {block.caption}" if block.caption else title
        return f'<figure class="chart"><figcaption>{text(words)}</figcaption>{picture(block.fig)}{live}{data}</figure>'
    if isinstance(block, list):
        return "<ul>" + "".join(f"<li>{text(line)}</li>" for line in block) + "</ul>"
    return f"<p>{text(block)}</p>"


def html_table(table: Table) -> str:
    """A table whose cells say to which column and row they belong."""

    def mark(number: int) -> str:
        return ' class="words"' if number in table.words else ""

    caption = f"<caption>{text(table.caption)}</caption>" if table.caption else ""
    heads = "".join(f'<th scope="col"{mark(number)}>{text(head)}</th>' for number, head in enumerate(table.heads))
    rows = ""
    for first, *others in table.rows:
        cells = "".join(f"<td{mark(number)}>{text(cell)}</td>" for number, cell in enumerate(others, 1))
        rows += f'<tr><th scope="row">{text(first)}</th>{cells}</tr>'
    kind = "wide modelled" if table.modelled else "wide"  # one that can be scrolled must be reached by keys, too
    return f'<div class="{kind}" tabindex="0"><table>{caption}<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'


def check_place(path: Path, overwrite: bool) -> None:
    """Raises UserError where a file is in the way that no report is."""
    if path.is_dir():
        raise UserError(f"output: {path} is a folder; name a file in it, as {path / 'report.html'}.")
    if path.exists() and not overwrite:
        with open(path, "rb") as source:
            if MARK.encode() not in source.read(10_000):
                raise place_error(path, "exists and is no report", "Add --overwrite", option="output")


def write_html(path: Path, title: str, sections: list[Section]) -> None:
    """Write the page, whole."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    write(path, title, to_html(title, sections), meta=policy)
