"""A real JupyterLab in a real browser, for the tests of forms, panels and charts.

    python -m tests.browser notebooks/08_hyperparameters.ipynb /tmp/shots    # runs it, screenshots in light and dark

It needs a Chromium: that of Playwright (`playwright install chromium`), or one of the system.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no sandbox: containers have no room for one; the rest keeps Chromium from looking up hosts of its own
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]  # fmt: skip
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def find_chromium() -> str | None:
    """The path of a Chromium: Playwright's own, else the system's; None where there is none."""
    with sync_playwright() as playwright:
        return find_chromium_of(playwright)


@contextlib.contextmanager
def open_browser():
    """A headless Chromium of Playwright's; its pages may use the clipboard."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium_of(playwright), args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


def find_chromium_of(playwright) -> str | None:
    own = playwright.chromium.executable_path
    return own if os.path.exists(own) else next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def serve_lab(folder: Path, settings: Path, **environment: str):
    """A JupyterLab server over `folder`, on loopback: its address with the token in it. settings: a folder of its own for them."""
    token = secrets.token_hex(16)
    about = {"JUPYTER_RUNTIME_DIR": settings / "runtime", "JUPYTER_CONFIG_DIR": settings / "config",
             "JUPYTERLAB_SETTINGS_DIR": settings / "user", "JUPYTERLAB_WORKSPACES_DIR": settings / "workspaces",
             "IPYTHONDIR": settings / "ipython", "JUPYTER_TOKEN": token}  # fmt: skip
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0",
               f"--ServerApp.root_dir={folder}", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    settings.mkdir(parents=True, exist_ok=True)
    with open(settings / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                  env=os.environ | {"PATH": path} | {k: str(v) for k, v in about.items()} | environment)  # fmt: skip
    try:
        yield wait_for_server(server, settings) + f"?token={token}"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_server(server, settings: Path, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        for path in (settings / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, OSError):
                url = json.loads(path.read_text())["url"]
                urllib.request.urlopen(f"{url}api", timeout=5).close()
                return f"{url}lab"
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{(settings / 'lab.log').read_text()[-3000:]}")


def set_theme(settings: Path, theme: str) -> None:
    """light or dark, before the page is opened; all cells of a notebook are drawn, not only those in sight."""
    for extension, name, chosen in (
        ("apputils", "themes", {"theme": THEMES[theme]}),
        ("notebook", "tracker", {"windowingMode": "none"}),
        ("apputils", "notification", {"fetchNews": "false"}),
    ):
        place = settings / "user" / "@jupyterlab" / f"{extension}-extension"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{name}.jupyterlab-settings").write_text(json.dumps(chosen))


def open_notebook(page, address: str, name: str, *, run: bool = True, seconds: float = 300) -> None:
    """Open a notebook of the server's folder as a person would, and run all of its cells."""
    lab, token = address.split("?")
    page.goto(f"{lab}/tree/{name}?{token}&reset", timeout=60_000)
    page.wait_for_selector(".jp-NotebookPanel .jp-Cell", timeout=60_000)
    wait_for_kernel(page)
    if run:
        run_all(page, seconds)


def wait_for_kernel(page, seconds: float = 60) -> None:
    """Until the notebook in front has its kernel, and that is idle; what is run before is lost, or asks for a kernel."""
    page.wait_for_function(
        "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady", timeout=1000 * seconds
    )
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.info")
    page.wait_for_selector(
        '.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=1000 * seconds
    )


def run_all(page, seconds: float = 300) -> None:
    """Run > Run All Cells, and wait for the last one."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        "() => document.querySelector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator').dataset.status === 'idle' && ("
        "document.querySelector('.jp-Cell [data-mime-type=\"application/vnd.jupyter.error\"]') ||"
        " [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(p => /\\d/.test(p.textContent)))",
        timeout=1000 * seconds,
    )  # fmt: skip
    errors = page.locator('.jp-Cell [data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    assert not errors, errors


def find_faults(page, selector: str) -> list[str]:
    """What axe-core calls serious or critical in a part of the page: rule, why, where."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=selector, options={"resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']}: {one['help']}: {node['target']}: {node['html'][:160]}"
            for one in found if one["impact"] in ("serious", "critical") for node in one["nodes"]]  # fmt: skip


def show(name: str, folder: Path) -> None:
    """Run a notebook in both themes, and keep pictures of all of it."""
    path = Path(name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        set_theme(folder / "settings", theme)
        with serve_lab(path.parent, folder / "settings", SFTLAB_PROFILE="smoke") as address, open_browser() as browser:
            page = browser.new_page(viewport={"width": 1200, "height": 1000})
            open_notebook(page, address, path.name)
            for number, cell in enumerate(page.locator(".jp-OutputArea-child:visible").all()):
                cell.scroll_into_view_if_needed()
                cell.screenshot(path=folder / f"{theme}-{number:02}.png")
            page.screenshot(path=folder / f"{theme}-page.png")
            print(theme, find_faults(page, ".jp-NotebookPanel .jp-OutputArea"))


if __name__ == "__main__":
    show(sys.argv[1], Path(sys.argv[2]))
