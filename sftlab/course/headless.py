"""Headless runs of the course's notebooks with papermill: parameters checked first, every failure named for what it is.

Papermill alone passes unknown parameters on with a warning, takes `sys.exit(0)` for success, and its metadata says "completed"
after a dead kernel. Here a notebook ends as completed, failed, dead kernel, timed out or interrupted, with the cell and the
error. Each leaves NAME.ipynb, NAME.html and, written last, NAME.json with its status; all together leave index.html.

    sftlab run notebooks/04_first_sft.ipynb -p max_steps 50 --profile smoke
"""

import ast
import contextlib
import hashlib
import json
import math
import os
import re
import signal
import textwrap
import time
from pathlib import Path

from sftlab import files
from sftlab.config.configs import FIELDS
from sftlab.config.options import check_value, coerce
from sftlab.course.html import export_html, write_index
from sftlab.course.notebook import resolve_profile
from sftlab.course.shared_kernel import SharedKernel
from sftlab.errors import UserError, near_match, place_error, refuse_token
from sftlab.files import ROOT

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
    papermill's progress bar; `plotly`: where the page finds plotly.js, as for `html.export_html`; `kernel`: run in this
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


KINDS = {"bool": bool, "int": int, "float": float, "str": str, "list": list}
EXIT_CODES = {"completed": 0, "failed": 1, "dead kernel": 3, "timed out": 4, "interrupted": 130}


def run_notebooks(paths, parameters: dict, output_dir, *, profile="", timeout=None, continue_=False) -> list[dict]:
    """Runs notebooks one after the other and returns their statuses, as NAME.json holds them.

    `timeout` is in seconds for each whole notebook. `continue_` skips what is completed in `output_dir` with the same
    parameters and source. Raises UserError, before anything is written, for input that can't work.
    """
    jobs, output_dir = plan_jobs(paths, parameters, resolve_profile(profile)), Path(output_dir).resolve()
    if output_dir.is_file() or output_dir.is_dir() and any(output_dir.iterdir()) and not continue_:
        raise place_error(output_dir, "is there and not empty", "Go on in it with --continue")
    if any(path.parent == output_dir for path in jobs):
        raise place_error(output_dir, "holds the notebooks themselves, which stay as they are")
    for path in jobs:
        book, facts = output_dir / path.name, output_dir / f"{path.stem}.json"
        ours = {
            book: "papermill" in files.read_json(book).get("metadata", {}),
            facts: "status" in files.read_json(facts),
        }
        for old, known in ours.items():
            if old.exists() and not known:
                raise place_error(old, "is not the output of an earlier run; it stays")
    if timeout is not None and not timeout > 0:
        raise UserError(f"timeout: {timeout:g} is no time to run in; give seconds, such as 600.")
    output_dir.mkdir(parents=True, exist_ok=True)
    statuses = []
    for number, (path, job) in enumerate(jobs.items(), 1):
        wanted = job | {"status": "completed"}
        before = files.read_json(output_dir / f"{path.stem}.json")
        if continue_ and {key: before.get(key) for key in wanted} == wanted:
            print(f"{path.stem}: completed before with the same source and parameters, skipped")
            statuses.append(before)
        else:
            statuses.append(run_notebook(path, job, output_dir, timeout, f"{number}/{len(jobs)} {path.stem}"))
        write_index(output_dir)
        if statuses[-1]["status"] == "interrupted":
            break
    return statuses


def add_run_arguments(parser) -> None:
    """The arguments of `sftlab run`."""
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help="a notebook, or a folder: all in it, sorted")
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="parameters", help="set a parameter that the notebook declares; repeatable", **pair)
    parser.add_argument("--profile", default="", help="smoke, cpu or gpu (default: $SFTLAB_PROFILE, else cpu)")
    parser.add_argument("--output-dir", default="", help="folder for all outputs (default: runs/DATE-TIME)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="stop a notebook that takes longer in all")
    again = "continue in --output-dir: skip what is completed with the same parameters"
    parser.add_argument("--continue", dest="continue_", action="store_true", help=again)


def run_command(args) -> int:
    """`sftlab run`: 0 all completed, 1 a cell failed, 3 a kernel died, 4 timed out, 130 interrupted; else UserError."""
    if args.continue_ and not args.output_dir:
        raise UserError("--continue goes on in an earlier run: name its folder with --output-dir.")
    output_dir = Path(args.output_dir or ROOT / "runs" / time.strftime("%Y%m%d-%H%M%S"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop also leaves statuses and an index
    options = {"profile": args.profile, "timeout": args.timeout, "continue_": args.continue_}
    try:
        statuses = run_notebooks(args.notebooks, dict(args.parameters), output_dir, **options)
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    bad = [status for status in statuses if status["status"] != "completed"]
    print(f"{len(statuses) - len(bad)} completed, {len(bad)} not. Report: {output_dir / 'index.html'}")
    for status in bad:
        print(f"  {status['status']}: {output_dir / status['notebook']}.html")
    return max(EXIT_CODES[status["status"]] for status in statuses)


def plan_jobs(paths, parameters: dict, profile: str) -> dict[Path, dict]:
    """What to run: notebook -> its name, parameters as the declared types, profile and hash of its cells' sources."""
    declared = {path: _read_declared(path) for given in paths for path in _find_notebooks(Path(given))}
    stems = [path.stem for path in declared]
    for stem in stems:
        if stems.count(stem) > 1 or stem == "index":
            raise UserError(f"{stem}.ipynb: each notebook needs a name of its own, other than index, for its outputs.")
    known = {name for kinds in declared.values() for name in kinds}
    for name, value in parameters.items():
        refuse_token(value, f"parameter {name}")  # the executed notebook would keep it
        if name not in known:
            there = f"Declared: {', '.join(sorted(known))}." if known else "It declares none."
            raise UserError(f"{', '.join(stems)}: no parameter {name!r}.{near_match(name, known)} {there}")
    jobs = {}
    for path, kinds in declared.items():
        values = {name: _coerce(name, value, *kinds[name]) for name, value in parameters.items() if name in kinds}
        for name in values.keys() & FIELDS.keys():
            check_value(FIELDS[name], values[name])
        own = resolve_profile(values.get("profile", profile))
        values |= {"profile": own} if "profile" in kinds else {}
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
        digest = hashlib.sha256(json.dumps(cells).encode()).hexdigest()  # not of the outputs, which a look may change
        jobs[path] = {"notebook": path.stem, "parameters": values, "profile": own, "source_sha256": digest}
    return jobs


def _find_notebooks(path: Path) -> list[Path]:
    found = sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        near = near_match(path.name, [other.name for other in path.parent.glob("*.ipynb")])
        raise UserError(f"{path}: no notebook there.{near}")
    return [notebook.resolve() for notebook in found]


def _read_declared(path: Path) -> dict[str, tuple[str, str]]:
    """Name -> (annotation, default) from the cell tagged `parameters`, as papermill reads it."""
    from nbformat import ValidationError
    from papermill import inspect_notebook
    from papermill.exceptions import PapermillException

    try:
        found = inspect_notebook(papermill_path(path))
        if "cells" not in files.read_json(path):
            raise ValueError("its format is older than nbformat 4; open and save it in JupyterLab")
    except (ValueError, ValidationError, PapermillException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: can't be read as a Python notebook: {reason}") from error
    return {name: (facts["inferred_type_name"], facts["default"]) for name, facts in found.items()}


def _coerce(name: str, value: object, annotation: str, default: str) -> object:
    """The value as annotated (`int`, `Optional[str]`, `List[int]`), else as the type of the default."""
    text = annotation.removeprefix("Optional[").rstrip("]").lower()
    base, _, element = text.partition("[")
    kind = KINDS.get(base)
    if annotation == "None":  # papermill's word for no annotation
        with contextlib.suppress(ValueError, SyntaxError):
            kind = KINDS.get(type(ast.literal_eval(default)).__name__)
    if kind is None:
        return value
    value = coerce(name, value, kind | None if annotation.startswith("Optional[") else kind)
    return [coerce(name, part, KINDS[element]) for part in value] if value and element in KINDS else value
