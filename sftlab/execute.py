"""One notebook, headless: run it with papermill, keep its outputs, and say how it ended.

Papermill alone takes `sys.exit(0)` for success, and its metadata says "completed" after a dead kernel. Here a notebook
ends as completed, failed, dead kernel, timed out or interrupted, with the cell and the error. `course` calls this.

    python -c "from sftlab.execute import run_notebook; help(run_notebook)"
"""

import contextlib
import math
import os
import re
import textwrap
import time
from pathlib import Path

from sftlab import files
from sftlab.report import export_html
from sftlab.shared_kernel import SharedKernel

MARKER = "papermill-error-cell-tag"  # the headings that papermill adds to a notebook with an error
ADDED_CELLS = {MARKER, "injected-parameters"}
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
CUT_SHORT = ("dead kernel", "timed out", "interrupted")  # papermill marks the running cell and all below as completed


def run_notebook(
    path: Path,
    job: dict,
    output_dir: Path,
    timeout: float | None,
    label: str,
    bar=True,
    plotly="plotly.min.js",
    kernel: SharedKernel | None = None,
) -> dict:
    """Runs one notebook, writes NAME.ipynb, NAME.html and last NAME.json into `output_dir`, and returns its content.

    `job` holds what NAME.json says about the input: notebook, parameters, profile, source_sha256. `timeout` is in
    seconds for the whole notebook. Whatever goes wrong in the notebook is a status, and no exception. `bar`: show
    papermill's progress bar; `plotly`: where the page finds plotly.js, as for `report.export_html`; `kernel`: run in this
    one, which is left to the next notebook if this one completes; else in a kernel of its own.
    """
    output, start = output_dir / f"{path.stem}.ipynb", time.monotonic()
    page, facts = output.with_suffix(".html"), output.with_suffix(".json")
    for stale in (output, page, facts, output_dir / "work" / path.stem / "record.json"):
        stale.unlink(missing_ok=True)
    bundled = job["parameters"].get("model_name", "tiny-base") == "tiny-base"
    with _environment(output_dir, job["profile"], offline=bundled and job["profile"] != "gpu"):
        status, error = _execute(path, output, job["parameters"], timeout, label, bar, kernel)
    cell, source = None, ""
    if output.exists():
        status, error, cell, source = _inspect_output(output, status, error)
        try:
            export_html(output, page, plotly)
        except Exception as problem:  # any of nbconvert's many parts: a page that is missing shall not lose the status
            print(f"{path.stem}: no HTML page: {type(problem).__name__}: {problem}")
    if kernel:
        kernel.release() if status == "completed" else kernel.close()
    result = {**job, "status": status, "seconds": round(time.monotonic() - start, 1)}
    result |= {"cell": cell, "cell_source": source, "error": error}
    files.write_json(facts, result)
    if status != "completed":
        where = "" if cell is None else f" in cell {cell + 1}"
        shown = "\n".join(source.splitlines()[:6] + ["", *error.splitlines()[-6:]])
        print(f"{path.stem}: {status}{where}\n{textwrap.indent(shown, '    ')}")
    return result


def papermill_path(path: Path) -> str:
    """The path as papermill takes it: it would fill in names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _execute(
    path: Path, output: Path, parameters: dict, timeout, label: str, bar: bool, kernel: SharedKernel | None
) -> tuple[str, str]:
    """Papermill's run as a status and an error's text. A completed one is still to be looked at."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    options = {"kernel_name": "python3", "language": "python", "cwd": path.parent, "start_timeout": 120}
    options |= {"store_widget_state": False}  # GitHub refuses stored widget states
    options["progress_bar"] = {"desc": label, "disable": not bar}  # TQDM_DISABLE is meant for the kernel
    options["extra_arguments"] = ["--log-level=50"]  # the kernel's own log would break the progress bar
    if timeout:  # nbclient asks before each cell, so what is left makes a limit for the whole notebook
        end = time.monotonic() + timeout
        options["timeout_func"] = lambda cell: max(1, math.ceil(end - time.monotonic()))
    try:
        if kernel:
            options["km"] = kernel.prepare(path.parent)
        execute_notebook(papermill_path(path), papermill_path(output), parameters, **options)
    except PapermillExecutionError as problem:
        return "failed", "\n".join(problem.traceback) or str(problem)
    except DeadKernelError:
        return "dead kernel", "The kernel died; most often the machine ran out of memory."
    except CellTimeoutError:
        return "timed out", f"The notebook took longer than the {timeout:g} seconds that it was given."
    except KeyboardInterrupt:
        return "interrupted", "Interrupted from outside."
    except Exception as problem:  # a full disk, a kernel that doesn't start: the other notebooks shall still run
        return "failed", f"{type(problem).__name__}: {problem}"
    return "completed", ""


def _inspect_output(output: Path, status: str, error: str) -> tuple[str, str, int | None, str]:
    """Status and error as the executed notebook shows them, with the index and the source of the cell that ended it.

    The index counts the cells of the source notebook. Writes into the executed notebook what papermill leaves out.
    """
    import nbformat

    try:
        notebook = nbformat.read(output, as_version=4)
    except ValueError:  # papermill was stopped while it wrote
        return status, error, None, ""
    raised = notebook.metadata.papermill.get("exception")
    marked = [cell for cell in notebook.cells if MARKER in cell.metadata.get("tags", [])]
    if marked and not raised:  # an error in a cell tagged raises-exception is wanted, and all cells ran
        notebook.cells = [cell for cell in notebook.cells if cell not in marked]
        files.write_text(output, nbformat.writes(notebook))
        return "completed", "", None, ""
    if status == "completed" and not raised:
        return "completed", "", None, ""
    if status == "completed":
        status, error = "failed", "SystemExit: the cell called sys.exit() or exit(), and the cells below did not run."
    own = [cell for cell in notebook.cells if not ADDED_CELLS.intersection(cell.metadata.get("tags", []))]
    code = [(index, cell.metadata.get("papermill", {})) for index, cell in enumerate(own) if cell.cell_type == "code"]
    started = [index for index, times in code if times.get("start_time")]
    error = "\n".join(ANSI_COLOUR.sub("", error).strip().splitlines()[-15:])
    if not started:
        return status, error, None, ""
    cell = own[started[-1]]
    if status in CUT_SHORT:
        cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text=error + "\n"))
        for late in [cell, *own[started[-1] + 1 :]]:
            late.metadata.papermill.status = "failed" if late is cell else "pending"
        notebook.metadata.papermill.exception = True
        files.write_text(output, nbformat.writes(notebook))
    return status, error, started[-1], cell.source


@contextlib.contextmanager
def _environment(output_dir: Path, profile: str, offline: bool):
    """What the kernel shall find in its environment; put back afterwards."""
    wanted = {"SFTLAB_RUN_DIR": str(output_dir), "SFTLAB_PROFILE": profile}
    wanted["TQDM_DISABLE"] = "1"  # a bar that nobody sees moving leaves a line for each step
    if offline:  # the bundled model needs no network, and a slow one must not hold it up
        wanted["HF_HUB_OFFLINE"] = "1"
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
