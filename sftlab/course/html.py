"""HTML of executed notebooks, and the index page of a run: what ran, on what machine, what came out, what failed.

The pages open offline: a policy in each has the browser refuse whatever a cell's output would load from the network. Charts
are pictures.

    python -c "from sftlab.course.html import write_index; print(write_index('runs/20260101-120000'))"
"""

import contextlib
import time
from pathlib import Path

from sftlab import files, pages, plots
from sftlab.machine import describe_machine

# nbconvert's page without what it loads from the network: require.js, MathJax and mermaid.
TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
img-src data: blob:">{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}"""


def export_html(ipynb: Path, page: Path) -> None:
    """Convert an executed notebook into a page that opens offline, its charts as pictures and its formulas drawn."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(ipynb, as_version=4)
    notebook.metadata.pop("widgets", None)  # would load the widgets' manager from the network; their text stays
    picture = pages.Html('<img alt="{}" src="data:image/png;base64,{}">')  # nbconvert's own has no words
    for data in (output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])):
        data.pop("application/vnd.jupyter.widget-view+json", None)
        if plots.PLOTLY_MIME in data and "image/png" in data:
            data["text/html"] = picture.format(data.get("text/plain", ""), "".join(data["image/png"].split()))
    source = Path(notebook.metadata.get("papermill", {}).get("input_path", ipynb))
    filters = {"markdown2html": make_markdown_filter(source.parent)}
    language = notebook.metadata.get("sftlab", {}).get("language", "en")
    exporter = HTMLExporter(raw_template=TEMPLATE, filters=filters, language_code=language)
    content, _ = exporter.from_notebook_node(notebook, {"metadata": {"name": Path(ipynb).stem}})
    files.write_text(Path(page), content)


def make_markdown_filter(folder: Path):
    """nbconvert's filter of Markdown, which draws formulas as MathML and takes in the pictures of this folder."""
    from jinja2 import pass_context
    from latex2mathml.converter import convert
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    def draw(body: str, display: str) -> str:
        with contextlib.suppress(Exception):  # whatever the converter can't read is left to the reader
            return convert(body, display=display)

    class Renderer(IPythonRenderer):
        def inline_math(self, body: str) -> str:
            is_formula = body == body.strip()  # as Jupyter reads them: $5 and $6 are money
            return is_formula and draw(body, "inline") or super().inline_math(body)

        def block_math(self, body: str) -> str:
            return draw(body, "block") or super().block_math(body)

        def _html_embed_images(self, html: str) -> str:
            """HTML without pictures as it stands: nbconvert 7.17 closes each open tag, so that nothing would be folded away."""
            return super()._html_embed_images(html) if "<img" in html else html

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
    done, rows = sum(status["status"] == "completed" for status in statuses), []
    for status in statuses:
        names = [f"{status['notebook']}.{kind}" for kind in ("html", "ipynb")]
        links = [pages.link(name, name.rpartition(".")[2]) for name in names if (output_dir / name).exists()]
        where = "" if status["cell"] is None else f" in cell {status['cell'] + 1}"
        error = "\n".join(status["error"].splitlines()[-3:])
        time_taken = "{} min {} s".format(*divmod(round(status["seconds"]), 60))
        rows.append((status["notebook"], status["status"] + where, time_taken, pages.Html(" ").join(links), error))
    sections = [
        pages.Section("Notebooks", [pages.Table(("Notebook", "Status", "Time", "Open", "Error"), rows)]),
        *[make_record(path) for path in sorted(output_dir.glob("work/*/record.json"))],
        pages.Section("Machine", [describe_machine()]),
    ]
    about = f"{done} of {len(statuses)} notebooks completed. {time.strftime('%Y-%m-%d %H:%M:%S %z')}"
    title = f"SFT Lab run {output_dir.resolve().name}"
    pages.write_page(output_dir / "index.html", title, sections, [about])
    return output_dir / "index.html"


def make_record(path: Path) -> pages.Section:
    """What a notebook left with `notebook.record`: its scores before and after, its note and its loss."""
    record = files.read_json(path)
    blocks = [record["note"]] if record.get("note") else []
    sides = [record.get(side) or {} for side in ("before", "after")]
    rows = [(label, *(pages.format_score(side.get(label)) for side in sides)) for label in sides[0] | sides[1]]
    if rows:
        blocks.append(pages.Table(("", "Before", "After"), rows))
    if any("loss" in entry for entry in record.get("log_history", [])):
        blocks.append(pages.Chart(plots.loss_curve(record["log_history"])))
    return pages.Section(record.get("title", path.parent.name), blocks)
