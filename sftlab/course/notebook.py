"""What every notebook of the course begins with and leaves: its profile, its work folder, and a record for the index page.

python -c "from sftlab import course; print(course.start('trial'))"
"""

import contextlib
import numbers
import os
import re
import sys
from pathlib import Path

from sftlab import files, language, pages
from sftlab.config.options import coerce
from sftlab.errors import UserError, near_match
from sftlab.files import ROOT

PROFILES = ("smoke", "cpu", "gpu")


def start(name: str, profile: str = "") -> tuple[str, Path]:
    """The set-up of every notebook: its profile, work folder and language; the libraries' chatter is turned down."""
    from IPython import get_ipython
    from IPython.display import Markdown

    from sftlab.models import load

    load.quiet_libraries()
    if language.choose(name) and (shell := get_ipython()):
        formatter = shell.display_formatter.formatters["text/markdown"]
        formatter.for_type(Markdown, lambda shown: language.translate_parts(shown.data))
    return resolve_profile(profile), work_folder(name)


def work_folder(name: str) -> Path:
    """Where the notebook `name` keeps its files: in the folder of the headless run, else in runs/lab."""
    run = os.environ.get("SFTLAB_RUN_DIR")
    folder = (Path(run) / "work" if run else ROOT / "runs" / "lab") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resolve_profile(profile: str = "") -> str:
    """smoke, cpu or gpu: as given, else the environment's SFTLAB_PROFILE, else cpu. Raises UserError for others."""
    chosen = profile or os.environ.get("SFTLAB_PROFILE") or "cpu"
    if chosen not in PROFILES:
        raise UserError(f"profile: {chosen!r} is not one of {', '.join(PROFILES)}.{near_match(chosen, PROFILES)}")
    return chosen


@contextlib.contextmanager
def quiet():
    """Hide what is printed and displayed inside, such as a report that was read once before; an error shows all of it."""
    from IPython.utils.capture import capture_output

    with capture_output(stderr=False) as captured:
        try:
            yield
        except BaseException:
            sys.stderr.write(captured.stdout)
            raise


def record(name: str, **facts) -> None:
    """Leaves facts of the notebook `name` for the index page and for sweeps: title, note, before, after, log_history, metrics.

    `before` and `after` map a label to a number or to (value, low, high), `metrics` a name to a plain number, which
    `sftlab sweep` can choose by. Raises UserError for a metric that is no number.
    """
    for label, value in facts.get("metrics", {}).items():
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else value
        facts["metrics"][label] = coerce(f"metrics, {label}", number, float)
    files.write_json(work_folder(name) / "record.json", facts)


def show_table(header, rows):
    """A table for notebooks; `…` in a cell is code, line breaks are ↵."""
    from IPython.display import Markdown

    def mark(cell) -> pages.Html:
        escaped = str(pages.Html.escape(language.translate(str(cell)).replace("\n", "↵")))
        return pages.Html(re.sub("`([^`]+)`", r"<code>\1</code>", escaped))

    table = pages.Table([mark(head) for head in header], [[mark(cell) for cell in row] for row in rows])
    return Markdown(str(pages.load_template().module.draw(table)))  # as HTML, Jupyter would align words to the right
