"""The lab as a learner sees it: JupyterLab in a browser, charts that are drawn, forms and panels that work by keyboard."""

import re
import time

import browser
import pytest
from course_notebooks import write_notebook

from sftlab import files
from sftlab.course import html
from sftlab.runs import state

pytestmark = pytest.mark.skipif(not browser.find_chromium(), reason="no Chromium here; `make browser` installs one")
CHART = """from sftlab import plots
history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0, "eval_loss": 2.0}]
plots.show(plots.loss_curve(history, title="損失"))"""
DRAWN = ".js-plotly-plot .main-svg .scatterlayer path.js-line"  # the lines themselves, not an empty frame


@pytest.fixture(scope="module")
def chromium():
    with browser.open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab with notebooks at their smallest size: its address, and the folder that it shows and they write to."""
    folder, settings = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("settings")
    with browser.serve_lab(folder, settings, SFTLAB_PROFILE="smoke", SFTLAB_RUN_DIR=str(folder)) as address:
        yield address, folder


def test_charts_everywhere(chromium, lab):
    """In JupyterLab, and as a picture in the exported page, which asks the network for nothing."""
    address, folder = lab
    write_notebook(folder / "chart.ipynb", CHART)
    page = browser.open_notebook(chromium, address, "chart.ipynb")
    page.wait_for_selector(DRAWN)
    browser.execute(page, "docmanager:save")
    page.close()
    html.export_html(folder / "chart.ipynb", folder / "chart.html")
    page, asked = chromium.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((folder / "chart.html").as_uri())
    picture = page.locator(".jp-OutputArea img[src^='data:image/png']")
    assert picture.is_visible() and "損失" in picture.get_attribute("alt")
    assert all(re.match("file:|data:|blob:", url) for url in asked), asked
    page.close()


def type_into(page, name: str, text: str) -> None:
    """Press Tab until the control with this label has the focus, and type over what it holds."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.labels?.[0]?.textContent") == name:
            page.keyboard.press("Control+A")
            return page.keyboard.type(text)
    raise AssertionError(f"{name} can't be reached by Tab")


def read_figure(page, name: str) -> str:
    """A figure beside the form, when it has been worked out."""
    page.wait_for_function("() => !document.querySelector('.sftlab-form .busy').textContent")
    return page.locator(f".sftlab-form .figures dt:text-is('{name}') + dd b").inner_text()


def wait_for_status(panel, words: str) -> None:
    panel.locator("[role=status]", has_text=words).first.wait_for()


def look(page) -> None:
    """In both themes no serious fault of axe-core's."""
    for title in browser.THEMES:
        browser.execute(page, "apputils:change-theme", theme=title)
        page.wait_for_function("name => document.body.dataset.jpThemeName === name", arg=title)
        page.wait_for_timeout(300)
        assert not (faults := browser.find_faults(page, ".sftlab-form, .sftlab-run")), faults


def test_a_learner_tunes_by_hand(chromium, lab):
    """Notebook 08 to its form: turn a knob by keyboard, start, reload in the middle, find the run, stop it, resume it."""
    address, folder = lab
    work = folder / "work" / "08_hyperparameters"
    cells = files.read_json(files.ROOT / "notebooks" / "08_hyperparameters.ipynb")["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    form_cell = next(number for number, source in enumerate(code) if "widgets.hyperparameters(" in source)
    write_notebook(folder / "08.ipynb", *code[: form_cell + 1], "from sftlab import runs\nruns.attach(work)")
    page = browser.open_notebook(chromium, address, "08.ipynb")
    form = page.locator(".sftlab-form")
    before = read_figure(page, "trained parameters")
    form.get_by_label("model_name", exact=True).focus()
    type_into(page, "lora_r", "4x")
    form.get_by_text("lora_r: '4x' is no int").wait_for()
    page.keyboard.press("Control+A")
    page.keyboard.type("4")
    type_into(page, "num_epochs", "600")  # longer than the test looks on, on any machine
    type_into(page, "output_dir", str(work / "by-hand"))
    shown = "() => [...document.querySelectorAll('.forms textarea')].every(area => area.value.includes('by-hand'))"
    page.wait_for_function(shown)
    assert int(read_figure(page, "trained parameters").replace(",", "")) * 4 == int(before.replace(",", ""))
    assert "fits" in read_figure(page, "memory")
    look(page)
    form.get_by_role("button", name="Start").focus()
    page.keyboard.press("Enter")
    wait_for_status(page.locator(".jp-Cell", has=form), "by-hand is running")
    browser.execute(page, "docmanager:save")
    page.reload()
    browser.wait_for_kernel(page)
    panel = page.locator(".jp-CodeCell").last
    panel.locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    wait_for_status(panel, "by-hand is running")
    panel.locator(DRAWN).first.wait_for()
    panel.get_by_role("button", name="Stop").click()
    wait_for_status(panel, "by-hand was stopped")
    stopped = state.read(work / "by-hand")
    assert stopped.status == "interrupted" and 0 < stopped.step < stopped.max_steps
    look(page)
    panel.get_by_role("button", name="Resume").click()
    wait_for_status(panel, "by-hand is running")
    end = time.monotonic() + browser.SECONDS
    while state.read(work / "by-hand").step < stopped.step + 3 and time.monotonic() < end:
        time.sleep(0.2)
    panel.get_by_role("button", name="Stop").click()
    wait_for_status(panel, "by-hand was stopped")
    page.close()
    ended = state.read(work / "by-hand")
    steps = [entry["step"] for entry in ended.history if "loss" in entry]
    assert ended.config.lora_r == 4 and ended.step >= stopped.step + 3 and steps == list(range(1, ended.step + 1))
