"""Pieces of HTML pages that open offline and load nothing from the network.

python -c "from sftlab import pages; print(pages.table(('a', 'b'), [(1, 2)]))"
"""

import html
from base64 import b64encode
from pathlib import Path

from sftlab import files

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
