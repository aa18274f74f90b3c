"""The lab as a learner sees it: JupyterLab in a browser, charts that are drawn, forms and panels that work by keyboard."""

import json
import re
import time

import browser
import nbformat
import pytest

CHROMIUM = browser.find_chromium()
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; `make browser` installs one")
CHART = """
from sftlab import plots
plots.show(plots.loss_curve([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0, "eval_loss": 2.0}], title="損失 </script>"))
"""
SLOW = 120_000  # milliseconds, for a machine that is busy with other tests
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
    from sftlab.course import headless

    (tmp_path / "lab").mkdir()
    notebook = write_notebook(tmp_path / "lab" / "chart.ipynb", CHART)
    browser.set_theme(tmp_path / "settings", "dark")
    with browser.serve_lab(notebook.parent, tmp_path / "settings") as address:
        page = chromium.new_page()
        browser.open_notebook(page, address, notebook.name)
        page.wait_for_selector(DRAWN, timeout=SLOW)
        page.close()
    assert headless.run_notebooks([notebook], {}, tmp_path / "out")[0]["status"] == "completed"
    address = (tmp_path / "out" / "chart.html").as_uri()
    for scripts in (True, False):
        context = chromium.new_context(offline=True, java_script_enabled=scripts)
        page, asked = context.new_page(), []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        page.goto(address)
        if scripts:
            page.wait_for_selector(DRAWN, timeout=SLOW)
        else:
            picture = page.locator(".jp-OutputArea img[src^='data:image/png']").first
            assert picture.is_visible() and "損失" in (picture.get_attribute("alt") or "")
        assert all(re.match("file:|data:|blob:", url) for url in asked), asked
        context.close()


def run_cell(page, text: str) -> None:
    """Run the one code cell that holds a text, and wait until its kernel is idle again."""
    cell = page.locator(".jp-CodeCell", has=page.locator(".cm-content", has_text=text)).first
    cell.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.wait_for_timeout(500)
    browser.wait_for_kernel(page)


def tab_to(page, name: str, most: int = 80) -> None:
    """Press Tab until the control with this label has the focus."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.labels?.[0]?.textContent") == name:
            return
    raise AssertionError(f"{name} can't be reached by Tab")


def type_into(page, name: str, text: str) -> None:
    tab_to(page, name)
    page.keyboard.press("Control+A")
    page.keyboard.type(text)


def read_figure(page, name: str) -> str:
    """A figure beside the form, when it has been worked out."""
    page.wait_for_function("() => !document.querySelector('.sftlab-form .busy').textContent")
    return page.locator(f".sftlab-form .figures dt:text-is('{name}') + dd b").inner_text()


def wait_for_status(panel, words: str, seconds: float = 120) -> None:
    panel.locator("[role=status]", has_text=words).first.wait_for(timeout=1000 * seconds)


def look(page, shots, name: str, *parts) -> None:
    """In both themes: a picture of each part, and no serious fault of axe-core's."""
    for theme, title in browser.THEMES.items():
        page.evaluate("theme => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", title)
        page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=title)
        page.wait_for_timeout(500)
        for number, part in enumerate(parts):
            part.scroll_into_view_if_needed()
            part.screenshot(path=shots / f"{name}-{number}-{theme}.png")
        assert not (faults := browser.find_faults(page, ".sftlab-form, .sftlab-run")), faults


def test_a_learner_tunes_by_hand(chromium, tmp_path):
    """Notebook 08: run all, turn a knob by keyboard, start, reload in the middle, find the run, stop it, resume it."""
    from sftlab.runs import state

    source = json.loads((browser.ROOT / "notebooks" / "08_hyperparameters.ipynb").read_text(encoding="utf-8"))
    knobs = next(cell for cell in source["cells"] if "parameters" in cell["metadata"].get("tags", []))
    knobs["source"] = re.sub(
        r"seeds: int = \d+", "seeds: int = 0", "".join(knobs["source"])
    )  # the form, without the sweep
    lab, work = tmp_path / "lab", tmp_path / "work" / "work" / "08_hyperparameters"
    lab.mkdir()
    (lab / "08.ipynb").write_text(json.dumps(source), encoding="utf-8")
    browser.set_theme(tmp_path / "settings", "light")
    environment = {"SFTLAB_PROFILE": "smoke", "SFTLAB_RUN_DIR": str(tmp_path / "work")}
    with browser.serve_lab(lab, tmp_path / "settings", **environment) as address:
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(SLOW)
        browser.open_notebook(page, address, "08.ipynb")
        form = page.locator(".sftlab-form")
        before = read_figure(page, "trained parameters")
        form.get_by_label("preset", exact=True).focus()
        type_into(page, "lora_r", "4x")
        form.get_by_text("lora_r: '4x' is no int").wait_for()
        page.keyboard.press("Control+A")
        page.keyboard.type("4")
        page.wait_for_function(
            "old => document.querySelector('.sftlab-form .figures dd b')?.textContent !== old", arg=before
        )
        assert int(read_figure(page, "trained parameters").replace(",", "")) * 4 == int(before.replace(",", ""))
        type_into(page, "num_epochs", "600")  # longer than the test looks on, on any machine
        type_into(page, "output_dir", str(work / "by-hand"))
        page.wait_for_timeout(1000)
        read_figure(page, "memory")
        look(page, tmp_path, "form", form)
        form.get_by_role("button", name="Start").focus()
        page.keyboard.press("Enter")
        panel = page.locator(".jp-Cell", has=form)
        wait_for_status(panel, "by-hand is running")
        page.keyboard.press("Escape")
        page.keyboard.press("Control+S")
        page.wait_for_timeout(1000)
        page.reload()
        page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
        browser.wait_for_kernel(page)
        run_cell(page, "runs.attach(work)")
        panel = page.locator(".jp-Cell", has=page.locator(".cm-content", has_text="runs.attach(work)"))
        panel.get_by_label("run", exact=True).select_option("by-hand")
        wait_for_status(panel, "by-hand is running")
        panel.locator(DRAWN).first.wait_for(timeout=SLOW)
        panel.get_by_role("button", name="Stop").click()
        wait_for_status(panel, "by-hand was stopped")
        stopped = state.read(work / "by-hand")
        assert stopped.status == "interrupted" and 0 < stopped.step < stopped.max_steps
        look(page, tmp_path, "panel", panel.locator(".jp-OutputArea"))
        panel.get_by_role("button", name="Resume").click()
        wait_for_status(panel, "by-hand is running")
        end = time.monotonic() + 120
        while state.read(work / "by-hand").step < stopped.step + 3 and time.monotonic() < end:
            time.sleep(0.2)
        panel.get_by_role("button", name="Stop").click()
        wait_for_status(panel, "by-hand was stopped")
        page.close()
    ended = state.read(work / "by-hand")
    steps = [entry["step"] for entry in ended.history if "loss" in entry]
    assert ended.config.lora_r == 4 and ended.step >= stopped.step + 3 and steps == list(range(1, ended.step + 1))
