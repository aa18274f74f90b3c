"""A real JupyterLab in a real browser, for the tests of forms, panels and charts.

It needs a Chromium: that of Playwright (`playwright install chromium`), or one of the system.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# no sandbox: containers have no room for one; the rest keeps Chromium from looking up hosts of its own
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
).split()
THEMES = ("JupyterLab Light", "JupyterLab Dark")
# All cells of a notebook are drawn, not only those in sight, and nothing asks for news.
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false"}}
SETTINGS |= {"notebook-extension/tracker": {"windowingMode": "none"}}
ERROR = '.jp-Cell [data-mime-type="application/vnd.jupyter.error"]'
SECONDS = 120  # for whatever a machine that is busy with other tests has to do


def find_chromium() -> str | None:
    """The path of a Chromium: Playwright's own, else the system's; None where there is none."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if os.path.exists(own) else next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def open_browser():
    """A headless Chromium."""
    path = find_chromium()
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=path, args=FLAGS) as browser:
        yield browser


@contextlib.contextmanager
def serve_lab(folder: Path, settings: Path, **environment: str):
    """A JupyterLab server over `folder`, on loopback: its address. settings: a folder for its settings."""
    for name, chosen in SETTINGS.items():
        place = settings / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(chosen))
    environment |= {name: str(settings) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--LabApp.news_url="]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    command += ["--LabApp.expose_app_in_browser=True"]
    with open(settings / "lab.log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)
    try:
        wait_for_server(server, f"http://127.0.0.1:{port}/api", settings / "lab.log")
        yield f"http://127.0.0.1:{port}/lab"
    finally:
        server.terminate()
        server.wait(SECONDS)


def wait_for_server(server: subprocess.Popen, address: str, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(address, timeout=5).close()
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def open_notebook(browser, address: str, name: str):
    """The page of a notebook of the server's folder, all of whose cells have run."""
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.set_default_timeout(1000 * SECONDS)
    page.goto(f"{address}/tree/{name}?reset")
    wait_for_kernel(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    done = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(one => /\\d/.test(one.textContent))"
    page.wait_for_function(f"() => {done} || document.querySelector({ERROR!r})")
    errors = page.locator(ERROR).all_inner_texts()
    assert not errors, errors
    return page


def wait_for_kernel(page) -> None:
    """Until the notebook in front has its kernel, and that is idle; what is run before is lost, or asks for a kernel."""
    page.wait_for_function("() => window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady")
    page.wait_for_selector('.jp-NotebookPanel .jp-Notebook-ExecutionIndicator[data-status="idle"]')


def execute(page, command: str, **arguments: str) -> None:
    """Have JupyterLab execute one of the commands of its menus, and wait for its end."""
    script = "([name, arguments]) => window.jupyterapp.commands.execute(name, arguments).then(() => true)"
    page.wait_for_function(script, arg=[command, arguments])


def find_faults(page, selector: str) -> list[str]:
    """What axe-core calls serious or critical in a part of the page: rule, why, where."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=selector, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['target']}: {node['html'][:160]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
