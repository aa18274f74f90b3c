"""The lab as a learner sees it: JupyterLab in a browser, charts that are drawn, forms and panels that work by keyboard."""

import re

import nbformat
import pytest

from tests import browser

CHROMIUM = browser.find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make browser` installs one")
CHART = """
from sftlab import plots
plots.show(plots.loss_curve([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0, "eval_loss": 2.0}], title="損失 </script>"))
"""
DRAWN = ".js-plotly-plot .main-svg .scatterlayer path.js-line"  # the lines themselves, not an empty frame


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as opened:
        yield opened


def write_notebook(path, *sources: str):
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}), path)  # fmt: skip
    return path


def test_charts_everywhere(chromium, tmp_path):
    """In JupyterLab, in the exported page without a network, and there without scripts."""
    from sftlab import course

    (tmp_path / "lab").mkdir()
    notebook = write_notebook(tmp_path / "lab" / "chart.ipynb", CHART)
    browser.set_theme(tmp_path / "settings", "dark")
    with browser.serve_lab(notebook.parent, tmp_path / "settings") as address:
        page = chromium.new_page()
        browser.open_notebook(page, address, notebook.name)
        page.wait_for_selector(DRAWN, timeout=30_000)
        page.close()
    assert course.run_notebooks([notebook], {}, tmp_path / "out")[0]["status"] == "completed"
    address = (tmp_path / "out" / "chart.html").as_uri()
    for scripts in (True, False):
        context = chromium.new_context(offline=True, java_script_enabled=scripts)
        page, asked = context.new_page(), []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address)
        if scripts:
            page.wait_for_selector(DRAWN, timeout=30_000)
        else:
            picture = page.locator(".jp-OutputArea img[src^='data:image/png']").first
            assert picture.is_visible() and "損失" in (picture.get_attribute("alt") or "")
        assert all(re.match("file:|data:|blob:", url) for url in asked), asked
        context.close()
