"""Reports as HTML pages that open offline: sections of paragraphs, lists, tables and charts, by one jinja2 template.

python -c "from sftlab.pages import *; write_page(Path('a.html'), 'A page', [Section('Numbers', [Table(('a', 'b'), [(1, 2)])])])"
"""

import functools
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup as Html  # a block or a cell of ready-made HTML; everything else is escaped

from sftlab import files, plots

NUMBER = tuple("0123456789+-−±<>≤≥~–—")  # what a cell begins with that holds a number, or none


@dataclass(frozen=True)
class Table:
    """Cells are text, numbers or Html. The first column names the row."""

    heads: Sequence
    rows: Sequence
    caption: str = ""
    modelled: bool = False

    @property
    def columns_of_words(self) -> set[int]:
        """Numbers of the columns that hold sentences: those with a cell that doesn't begin like a number."""
        cells = ((number, str(cell)) for row in self.rows for number, cell in enumerate(row))
        return {number for number, cell in cells if cell and not cell.startswith(NUMBER)}


@dataclass(frozen=True)
class Chart:
    """A plotly figure as a picture, its numbers in words, and a sentence about it."""

    fig: object
    caption: str = ""

    @property
    def summary(self) -> str:
        return plots.summarise(self.fig)

    @property
    def png(self) -> str:
        return b64encode(plots.draw_static(self.fig)).decode()


@dataclass(frozen=True)
class Section:
    """A heading with its blocks: paragraphs (str), lists (list of str), tables, charts, Html. `page`: on a new page of paper."""

    title: str
    blocks: list = field(default_factory=list)
    page: bool = False


def format_number(value: float) -> str:
    """A number: whole where it is large, else four digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_score(value) -> str:
    """A number, or a value with its interval; in percent where all three lie in 0..1, as shares do."""
    if isinstance(value, list) and all(0 <= part <= 1 for part in value):
        return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * part for part in value))
    if isinstance(value, list):
        return "{:.4g} ({:.4g} to {:.4g})".format(*value)
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def link(name: str, words: str) -> Html:
    """A link to a file beside the page."""
    return Html('<a href="{}">{}</a>').format(quote(name), words)


@functools.cache
def load_template(package: str = "sftlab", name: str = "page.html.j2"):
    """A template of a package, which escapes what it is given."""
    from jinja2 import Environment, PackageLoader

    return Environment(loader=PackageLoader(package, "."), autoescape=True).get_template(name)


def write_page(path: Path, title: str, sections: Sequence[Section], intro: Sequence = ()) -> None:
    """Write a page, whole or not at all. `intro`: blocks below the title."""
    page = load_template().render(title=title, sections=sections, intro=intro)
    files.write_text(path, page + "\n")
