"""The pages of a run: they open offline, show charts and formulas, and escape what notebooks and records put into them."""

import base64
import json
import re

import nbformat
import pytest
from bs4 import BeautifulSoup

from sftlab import files, plots
from sftlab.course import html, notebook

EVIL = "<script>alert(1)</script>"
HISTORY = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 2}]
TEXTS = ["</s>", EVIL, "a|b", 'it\'s "so"', "a &amp; b", "odd ` <b>"]
CODES = ["</s>", "a*b*c_d_e", "$x$", "<|im_end|>", "\\n", "'x' & 'y'"]
PROSE = r"""# Title
Rank $r$: $\frac{\alpha}{r} BA$ &lt;b&gt;, $5 and $6, `$x$`, $\nonsense{$, [link](https://example.org) ![pic](near.svg)

$$W' = W + BA$$

<details><summary>Solution</summary>

```python
answer = 4
```

</details>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """The HTML of a notebook with a chart, formulas, a table, and with much that a page must not load or run."""
    fig = plots.loss_curve(HISTORY, title="</script>" + EVIL)
    chart = {plots.PLOTLY_MIME: json.loads(fig.to_json()), "text/plain": plots.summarise(fig)}
    chart["image/png"] = base64.b64encode(plots.draw_static(fig)).decode()
    table = notebook.show_table(("text", "code"), [(one, f"`{two}`") for one, two in zip(TEXTS, CODES, strict=True)])
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "IntSlider(value=3)"}
    outputs = [nbformat.v4.new_output("display_data", data) for data in (chart, {"text/markdown": table.data}, widget)]
    outputs.append(nbformat.v4.new_output("stream", text=EVIL))
    book = nbformat.v4.new_notebook(metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}}})
    code = nbformat.v4.new_code_cell(f"print('{EVIL}')", outputs=outputs, execution_count=1)
    book.cells = [nbformat.v4.new_markdown_cell(PROSE), code]
    folder = tmp_path_factory.mktemp("run")
    (folder / "near.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    nbformat.write(book, folder / "a.ipynb")
    html.export_html(folder / "a.ipynb", folder / "a.html")
    assert {path.name for path in folder.iterdir()} == {"a.ipynb", "a.html", "near.svg"}
    return (folder / "a.html").read_text()


def find_loaded(page: str) -> set[str]:
    """Everything that the page loads by itself, and isn't in it."""
    found = re.findall(r"""<(?!a\b)\w+[^>]*?\b(?:src|href|srcset)\s*=\s*["']?([^"'\s>]+)""", page)
    found += re.findall(r"""@import[^;]*|import\s+\S*\s*from\s*["']http[^"']*""", page)
    return {address for address in found if not address.startswith("data:image/")}


def test_a_page_loads_nothing_runs_no_text_and_has_the_chart_as_a_picture_with_words(page):
    assert not find_loaded(page) and page.count('src="data:image/svg+xml;base64,') == 1
    assert "default-src 'none'" in page and "<script" not in page and "IntSlider(value=3)" in page
    assert 'href="https://example.org"' in page  # a link is followed by a person only
    (picture,) = BeautifulSoup(page, "html.parser").select('.jp-OutputArea img[src^="data:image/png"]')
    assert "training: 2 at 1 -> 1 at 2" in picture["alt"] and EVIL in picture["alt"]
    assert EVIL not in page and "&lt;script&gt;alert(1)" in page


def test_formulas_are_drawn_and_tables_are_read_as_they_were_given(page):
    soup = BeautifulSoup(page, "html.parser")
    cells = [cell.text for cell in soup.select(".jp-OutputArea tbody tr > *")]
    assert cells == [cell for row in zip(TEXTS, CODES, strict=True) for cell in row]
    assert [cell.text for cell in soup.select(".jp-OutputArea tbody code")] == CODES
    prose = soup.select_one(".jp-MarkdownCell")
    assert len(prose.select("math")) == 3 and prose.select("math mfrac") and prose.select_one("math[display=block]")
    assert "$5 and $6" in prose.text and "<b>" in prose.text and prose.code.text == "$x$" and "$r$" not in prose.text
    assert r"$\nonsense{$" in prose.text
    assert "answer = 4" in prose.details.text  # folded away


def test_index_shows_scores_loss_and_failures_and_escapes_all_of_it(tmp_path):
    failed = {"notebook": "b", "status": "failed", "seconds": 75.2, "cell": 2, "cell_source": EVIL, "error": EVIL}
    files.write_json(tmp_path / "b.json", failed)
    (tmp_path / "other.json").write_text("[1]")
    record = {"title": EVIL, "note": EVIL, "before": {EVIL: [0.1, 0.05, 0.2], "ppl": 12.3456}, "log_history": HISTORY}
    odd = {"log_history": [EVIL], "before": {"a": 0.125}}
    for name, facts in (("a", record | {"after": {EVIL: [0.5, 0.4, 0.6]}}), ("b", odd)):
        files.write_json(tmp_path / "work" / name / "record.json", facts)
    text = html.write_index(tmp_path).read_text()
    assert EVIL not in text and text.count("&lt;script&gt;alert(1)") >= 4
    assert "1 min 15 s" in text and "failed in cell 3" in text
    assert "10.0 % (5.0 to 20.0)" in text and "50.0 % (40.0 to 60.0)" in text and "12.35" in text
    assert "<td>0.125</td>" in text and re.search(r"\d+ cores, \d+ GiB memory.*python 3.*torch .*, peft \d", text, re.S)
    assert text.count("data:image/png;base64,") == 1
    assert not find_loaded(text) and "default-src 'none'" in text and "<script" not in text
