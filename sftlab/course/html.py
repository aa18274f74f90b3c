"""HTML of executed notebooks, and the index page of a run: what ran, on what machine, what came out, what failed.

The pages open offline and load nothing from the network: plotly.js lies beside them once, as plotly.min.js, and where
even that is missing, a chart is a picture. An interrupted writer leaves the old page, never half a new one.

    python -c "from sftlab.course.html import write_index; print(write_index('runs/20260101-120000'))"
"""

import json
import re
import time
from pathlib import Path
from urllib.parse import quote

from sftlab import files, pages
from sftlab.machine import describe_machine
from sftlab.pages import table, text
from sftlab.plots import PLOTLY_MIME

# nbconvert's page without what it loads from the network: require.js, MathJax and mermaid.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}<script src="PLOTLY"></script>{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}"""
SHOWN_TYPES = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]


def export_html(ipynb: Path, page: Path, plotly: str = "plotly.min.js") -> None:
    """Converts an executed notebook into a page that opens offline, its plotly charts interactive.

    plotly: where plotly.js lies, seen from the page; it's written there if it is missing.
    """
    import nbformat
    from bs4 import BeautifulSoup
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = nbformat.read(ipynb, as_version=4)
    notebook.metadata.pop("widgets", None)  # would load the widgets' manager from the network; their text stays
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if PLOTLY_MIME in data:
                data["text/html"] = _chart(data[PLOTLY_MIME], data.get("image/png", ""), data.get("text/plain", ""))
    config = Config({"NbConvertBase": {"display_data_priority": SHOWN_TYPES}})
    exporter = HTMLExporter(config=config, raw_template=TEMPLATE.replace("PLOTLY", plotly))
    content, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(ipynb).stem}})
    soup = BeautifulSoup(content, "html.parser")
    for tag in soup.select("[src], link[href]"):  # what a cell's own output or text may load
        address = tag.get("src") or tag.get("href", "")
        if re.match(r"\s*(https?:)?//", address, re.I):
            tag.replace_with(f"[left out: {address}]" if tag.name in ("img", "iframe") else "")
    for words in soup.select(".jp-RenderedMarkdown, .jp-RenderedLatex"):
        replace_formulas(words)
    write_plotly((Path(page).parent / plotly).parent)
    files.write_text(Path(page), str(soup))


def write_index(output_dir: Path) -> Path:
    """Writes `output_dir/index.html` from the status files and the notebooks' records, and returns its path."""
    output_dir = Path(output_dir)
    found = [files.read_json(path) for path in sorted(output_dir.glob("*.json"))]
    statuses = [facts for facts in found if "notebook" in facts and "status" in facts]
    done = sum(status["status"] == "completed" for status in statuses)
    rows = "".join(_status_row(output_dir, status) for status in statuses)
    parts = [
        f"<h1>SFT Lab run {text(output_dir.resolve().name)}</h1>",
        f"<p>{done} of {len(statuses)} notebooks completed. {text(time.strftime('%Y-%m-%d %H:%M:%S %z'))}</p>",
        f'<p class="note">{"<br>".join(text(line) for line in describe_machine())}</p>',
        table(("Notebook", "Status", "Time", "Open"), rows),
        *[show_failure(status) for status in statuses if status["status"] != "completed"],
        *[_record(path.parent.name, files.read_json(path)) for path in sorted(output_dir.glob("work/*/record.json"))],
    ]
    write_plotly(output_dir)
    pages.write(output_dir / "index.html", "SFT Lab run", parts, script="plotly.min.js")
    return output_dir / "index.html"


def _status_row(output_dir: Path, status: dict) -> str:
    name, seconds = str(status["notebook"]), round(status.get("seconds", 0))
    files = [f for f in (f"{name}.html", f"{name}.ipynb") if (output_dir / f).exists()]
    links = " ".join(f'<a href="{quote(file)}">{text(file.rsplit(".", 1)[1])}</a>' for file in files)
    look = "" if status["status"] == "completed" else ' class="bad"'
    taken = f"{seconds // 60} min {seconds % 60} s"
    return f"<tr><td>{text(name)}</td><td{look}>{text(status['status'])}</td><td>{taken}</td><td>{links}</td></tr>"


def show_failure(status: dict) -> str:
    """The cell that ended a notebook, and its error."""
    where = "" if status.get("cell") is None else f" in cell {status['cell'] + 1}"
    head = f"<h2>{text(status['notebook'])}: {text(status['status'])}{text(where)}</h2>"
    source, error = text(status.get("cell_source") or ""), text(status.get("error") or "")
    return f"<section>{head}<pre>{source}</pre><pre>{error}</pre></section>"


def _record(name: str, record: dict) -> str:
    """What a notebook left with `notebook.record`: its scores before and after, its note and its loss."""
    parts = [f"<h2>{text(record.get('title', name))}</h2>", f"<p>{text(record.get('note', ''))}</p>"]
    before, after = (record.get(key, {}) for key in ("before", "after"))
    before, after = (part if isinstance(part, dict) else {"score": part} for part in (before, after))
    rows = "".join(
        f"<tr><td>{text(label)}</td><td>{_score(before.get(label))}</td><td>{_score(after.get(label))}</td></tr>"
        for label in dict.fromkeys([*before, *after])
    )
    if rows:
        parts.append(table(("", "Before", "After"), rows))
    if record.get("log_history"):
        parts.append(_loss_chart(record["log_history"]))
    return f"<section>{''.join(parts)}</section>"


def _score(value) -> str:
    """A number, or a value with its interval; in percent where all three lie in 0..1."""
    if isinstance(value, list) and len(value) == 3 and all(isinstance(part, int | float) for part in value):
        if all(0 <= part <= 1 for part in value):
            return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * part for part in value))
        return "{:.4g} ({:.4g} to {:.4g})".format(*value)
    return f"{value:.4g}" if isinstance(value, float) else text("" if value is None else value)


def _loss_chart(log_history) -> str:
    from sftlab.plots import loss_curve

    try:
        fig = loss_curve(log_history)
    except (AttributeError, TypeError, ValueError) as error:
        return f"<p>The loss can't be drawn: {text(error)}</p>"
    return show_chart(fig)


def show_chart(fig) -> str:
    """A plotly figure in a page that loads plotly.js: interactive, or the picture of it where there is none."""
    from base64 import b64encode

    from sftlab.plots import draw_static, summarise

    return _chart(json.loads(fig.to_json()), b64encode(draw_static(fig)).decode(), summarise(fig))


def _chart(figure: dict, png: str, words: str) -> str:
    """A picture that plotly.js, where the page finds it, replaces by the interactive chart."""
    picture = f'<img alt="{text(words)}" src="data:image/png;base64,{text("".join(png.split()))}">' if png else ""
    data = json.dumps(figure).replace("<", "\\u003c")  # no text in it can end the script
    draw = f'const f = {data}, d = document.currentScript.previousElementSibling; d.innerHTML = ""; '
    draw += "Plotly.newPlot(d, f.data, f.layout, {responsive: true, displaylogo: false});"
    return f"<div>{picture}</div><script>if (window.Plotly) {{ {draw} }}</script>"


def write_plotly(folder: Path) -> None:
    """plotly.js into a folder of pages, once."""
    from plotly.offline import get_plotlyjs

    if not (folder / "plotly.min.js").exists():
        files.write_text(folder / "plotly.min.js", get_plotlyjs())


FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)  # as Jupyter reads them: $5 and $6 are money


def draw_formulas(html: str) -> str:
    """HTML in which `$…$` and `$$…$$` are MathML; what stands in code, and what is no formula, stays as it is."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    replace_formulas(soup)
    return str(soup)


def replace_formulas(soup) -> None:
    """The same in a tree of Beautiful Soup's, in place."""
    from bs4 import BeautifulSoup
    from latex2mathml.converter import convert

    for piece in soup.find_all(string=FORMULA):
        if piece.find_parent(["code", "pre", "script", "style"]):
            continue
        done, end = [], 0
        for found in FORMULA.finditer(piece):
            shown, inline = found.groups()
            try:
                drawn = convert(shown or inline, display="block" if shown else "inline")
            except Exception:  # whatever the converter can't read is left to the reader
                continue
            done += [piece[end : found.start()], BeautifulSoup(drawn, "html.parser")]
            end = found.end()
        if done:
            piece.replace_with(*done, piece[end:])
