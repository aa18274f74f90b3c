"""HTML of executed notebooks, and the index page of a run: what ran, on what machine, what came out, what failed.

The pages open offline: a policy in each has the browser refuse whatever a cell's output would load from the network.
plotly.js lies beside them once; where even that is missing, a chart is a picture.

    python -c "from sftlab.course.html import write_index; print(write_index('runs/20260101-120000'))"
"""

import contextlib
import json
import time
from pathlib import Path

from sftlab import files, pages, plots
from sftlab.machine import describe_machine

PLOTLY = "plotly.min.js"
# nbconvert's page without what it loads from the network: require.js, MathJax and mermaid.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline' 'self' file:; img-src data: blob:"><script src="PLOTLY"></script>{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}"""
SHOWN_TYPES = ["text/html", "text/markdown", "image/svg+xml", "text/latex", "image/png", "image/jpeg", "text/plain"]


def export_html(ipynb: Path, page: Path, plotly: str = PLOTLY) -> None:
    """Convert an executed notebook into a page that opens offline, its plotly charts interactive and its formulas drawn.

    plotly: where plotly.js lies, seen from the page; it's written there if it is missing.
    """
    import nbformat
    from nbconvert import HTMLExporter
    from plotly.offline import get_plotlyjs
    from traitlets.config import Config

    notebook = nbformat.read(ipynb, as_version=4)
    notebook.metadata.pop("widgets", None)  # would load the widgets' manager from the network; their text stays
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if figure := data.get(plots.PLOTLY_MIME):
                data["text/html"] = make_chart(figure, data.get("image/png", ""), data.get("text/plain", ""))
    source = Path(notebook.metadata.get("papermill", {}).get("input_path", ipynb))
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": SHOWN_TYPES}}),
        raw_template=TEMPLATE.replace("PLOTLY", plotly),
        filters={"markdown2html": make_markdown_filter(source.parent)},
    )
    content, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(ipynb).stem}})
    script = Path(page).parent / plotly
    if not script.exists():
        files.write_text(script, get_plotlyjs())
    files.write_text(Path(page), content)


def make_chart(figure: dict, png: str, words: str) -> str:
    """A picture that plotly.js, where the page finds it, replaces by the interactive chart."""
    picture = pages.Html('<img alt="{}" src="data:image/png;base64,{}">').format(words, "".join(png.split()))
    data = json.dumps(figure).replace("<", "\\u003c")  # no text in it can end the script
    draw = f'const f = {data}, d = document.currentScript.previousElementSibling; d.innerHTML = ""; '
    draw += "Plotly.newPlot(d, f.data, f.layout, {responsive: true, displaylogo: false});"
    return f"<div>{picture if png else ''}</div><script>if (window.Plotly) {{ {draw} }}</script>"


def make_markdown_filter(folder: Path):
    """nbconvert's filter of Markdown, which draws formulas as MathML and takes in the pictures of this folder."""
    from jinja2 import pass_context
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            if body != body.strip():  # as Jupyter reads them: $5 and $6 are money
                return super().inline_math(body)
            return self.draw(body, "inline") or super().inline_math(body)

        def block_math(self, body: str) -> str:
            return self.draw(body, "block") or super().block_math(body)

        def draw(self, body: str, display: str) -> str:
            with contextlib.suppress(Exception):  # whatever the converter can't read is left to the reader
                return convert(body, display=display)

    @pass_context
    def convert_markdown(context, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = Renderer(escape=False, attachments=attachments, embed_images=True, path=str(folder))
        return MarkdownWithMath(renderer=renderer).render(source)

    return convert_markdown


def write_index(output_dir: Path) -> Path:
    """Write `output_dir/index.html` from the status files and the notebooks' records, and return its path."""
    output_dir = Path(output_dir)
    found = map(files.read_json, sorted(output_dir.glob("*.json")))
    statuses = [facts for facts in found if {"notebook", "status"} <= facts.keys()]
    done = sum(status["status"] == "completed" for status in statuses)
    records = {path.parent.name: files.read_json(path) for path in sorted(output_dir.glob("work/*/record.json"))}
    rows = [list_row(output_dir, status) for status in statuses]
    sections = [
        pages.Section("Notebooks", [pages.Table(("Notebook", "Status", "Time", "Open", "Error"), rows)]),
        *[make_record(name, record) for name, record in records.items()],
        pages.Section("Machine", [describe_machine()]),
    ]
    about = f"{done} of {len(statuses)} notebooks completed. {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    title = f"SFT Lab run {output_dir.resolve().name}"
    pages.write_page(output_dir / "index.html", title, sections, [about])
    return output_dir / "index.html"


def list_row(output_dir: Path, status: dict) -> tuple:
    """A notebook's row in the index, with links to its page and to the executed notebook, and the last lines of its error."""
    names = [f"{status['notebook']}.{kind}" for kind in ("html", "ipynb")]
    links = [pages.link(name, name.rpartition(".")[2]) for name in names if (output_dir / name).exists()]
    minutes, seconds = divmod(round(status.get("seconds", 0)), 60)
    where = "" if status.get("cell") is None else f" in cell {status['cell'] + 1}"
    error = "\n".join(status.get("error", "").splitlines()[-3:])
    return (
        status["notebook"],
        status["status"] + where,
        f"{minutes} min {seconds} s",
        pages.Html(" ").join(links),
        error,
    )


def make_record(name: str, record: dict) -> pages.Section:
    """What a notebook left with `notebook.record`: its scores before and after, its note and its loss."""
    blocks = [record["note"]] if record.get("note") else []
    sides = [record.get(side) or {} for side in ("before", "after")]
    rows = [(label, *(pages.format_score(side.get(label)) for side in sides)) for label in sides[0] | sides[1]]
    if rows:
        blocks.append(pages.Table(("", "Before", "After"), rows))
    if record.get("log_history"):
        try:
            blocks.append(pages.Chart(plots.loss_curve(record["log_history"])))
        except (AttributeError, TypeError, ValueError) as error:
            blocks.append(f"The loss can't be drawn: {error}")
    return pages.Section(record.get("title", name), blocks)
