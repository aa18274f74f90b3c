"""Headless runs of notebooks with papermill: parameters are checked first, and every way to end has its name.

Papermill alone passes unknown parameters on with a warning, and takes `sys.exit(0)` and a dead kernel for success. Here a
notebook ends as completed, failed, dead kernel, timed out or interrupted. Each leaves NAME.ipynb, NAME.html and, written last,
NAME.json with its status, the cell that ended it and the error; all together leave index.html.

    sftlab run notebooks/04_first_sft.ipynb -p max_steps 50 --profile smoke
"""

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
from sftlab.errors import UserError, near_match, place_error, refuse_token

ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KINDS = {"bool": bool, "int": int, "float": float, "str": str}
EXIT_CODES = {"completed": 0, "failed": 1, "dead kernel": 3, "timed out": 4, "interrupted": 130}


def run_notebook(path: Path, job: dict, output_dir: Path, label: str = "", timeout: float | None = None) -> dict:
    """Run one notebook, write NAME.ipynb, NAME.html and last NAME.json into the new folder, and return its content.

    job: what NAME.json says of the input, as `plan_jobs` has it; label: of the progress bar, which is shown if there is one;
    timeout: seconds for the whole notebook. What goes wrong in the notebook is a status, not an exception.
    """
    output, start, before = output_dir / f"{path.stem}.ipynb", time.monotonic(), dict(os.environ)
    os.environ |= {"SFTLAB_RUN_DIR": str(output_dir), "SFTLAB_PROFILE": job["profile"]}  # the kernel's, too
    os.environ["TQDM_DISABLE"] = "1"  # a bar that nobody sees moving leaves a line for each step
    if job["parameters"].get("model_name", "tiny-base") == "tiny-base" and job["profile"] != "gpu":
        os.environ["HF_HUB_OFFLINE"] = "1"  # a slow network must not hold up a model that needs none
    try:
        ended = run_cells(path, output, job["parameters"], label, timeout)
    finally:
        os.environ.clear()
        os.environ.update(before)
    if output.exists():
        try:
            export_html(output, output.with_suffix(".html"))
        except Exception as problem:  # any of nbconvert's many parts: a page that is missing must not lose the status
            print(f"{path.stem}: no HTML page: {type(problem).__name__}: {problem}")
    facts = job | ended | {"seconds": round(time.monotonic() - start, 1)}
    files.write_json(output.with_suffix(".json"), facts)
    if facts["status"] != "completed":
        where = "" if facts["cell"] is None else f" in cell {facts['cell'] + 1}"
        shown = "\n".join([*facts["cell_source"].splitlines()[:6], "", *facts["error"].splitlines()[-6:]])
        print(f"{path.stem}: {facts['status']}{where}\n{textwrap.indent(shown, '    ')}")
    return facts


def run_cells(path: Path, output: Path, parameters: dict, label: str, timeout: float | None = None) -> dict:
    """Run a notebook by papermill's engine, which writes it after each cell: status, error, cell (from 0) and cell_source.

    The cell is the one of the source notebook that ended it.
    """
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.engines import papermill_engines
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(path))
    own = list(notebook.cells)
    if parameters:
        notebook = parameterize_notebook(notebook, parameters, kernel_name="python3", language="python")
    notebook.metadata.papermill["input_path"] = str(path)
    options = {"kernel_name": "python3", "output_path": str(output), "start_timeout": 120}
    options |= {"extra_arguments": ["--log-level=50"]}  # the kernel's own log would break the progress bar
    options |= {"store_widget_state": False}  # GitHub refuses stored widget states
    options |= {"progress_bar": {"desc": label, "disable": False} if label else False}
    if timeout:  # nbclient asks before each cell, so what is left makes a limit for the whole notebook
        end = time.monotonic() + timeout
        options["timeout_func"] = lambda cell: max(1, math.ceil(end - time.monotonic()))
    status, error = "completed", ""
    try:
        with contextlib.chdir(path.parent):
            papermill_engines.execute_notebook_with_engine(None, notebook, **options)
    except DeadKernelError:
        status, error = "dead kernel", "The kernel died; most often the machine ran out of memory."
    except CellTimeoutError:
        status, error = "timed out", f"The notebook took longer than the {timeout:g} seconds that it was given."
    except KeyboardInterrupt:
        status, error = "interrupted", "Interrupted from outside."
    except Exception as problem:  # a full disk, a kernel that doesn't start: the other notebooks shall still run
        status, error = "failed", f"{type(problem).__name__}: {problem}"
    raised = status == "completed" and notebook.metadata.papermill.exception
    started = [number for number, cell in enumerate(own) if cell.metadata.papermill.get("start_time")]
    ended = {"status": "failed" if raised else status, "error": error, "cell": None, "cell_source": ""}
    if ended["status"] == "completed" or not started:
        return ended
    cell = own[started[-1]]
    if raised:
        found = [one for one in cell.outputs if one.output_type == "error"][-1:]
        error = "\n".join(line for one in found for line in one.traceback)
        if not found or found[0].ename == "SystemExit":
            error = "SystemExit: the cell called sys.exit() or exit(), and the cells below did not run."
        ended["error"] = "\n".join(ANSI_COLOUR.sub("", error).strip().splitlines()[-15:])
    return ended | {"cell": started[-1], "cell_source": cell.source}


def run_notebooks(paths, parameters: dict, output_dir, profile="", timeout=None) -> list[dict]:
    """Run notebooks one after the other and return their statuses, as NAME.json holds them.

    Raises UserError, before anything is written, for input that can't work.
    """
    jobs, output_dir = plan_jobs(paths, parameters, resolve_profile(profile)), Path(output_dir).resolve()
    if any(output_dir.glob("*")):
        raise place_error(output_dir, "is there and not empty")
    output_dir.mkdir(parents=True, exist_ok=True)
    statuses = []
    for number, (path, job) in enumerate(jobs.items(), 1):
        statuses.append(run_notebook(path, job, output_dir, f"{number}/{len(jobs)} {path.stem}", timeout))
        write_index(output_dir)
        if statuses[-1]["status"] == "interrupted":
            break
    return statuses


def add_parameters(parser) -> None:
    pair = {"nargs": 2, "action": "append", "default": [], "metavar": ("NAME", "VALUE")}
    parser.add_argument("-p", dest="parameters", help="set a parameter that the notebook declares; repeatable", **pair)


def add_run_arguments(parser) -> None:
    """The arguments of `sftlab run`."""
    parser.add_argument("notebooks", nargs="+", metavar="NOTEBOOK", help="a notebook, or a folder: all in it, sorted")
    add_parameters(parser)
    parser.add_argument("--profile", default="", help="smoke, cpu or gpu (default: $SFTLAB_PROFILE, else cpu)")
    parser.add_argument("--output-dir", default="", help="folder for all outputs (default: runs/DATE-TIME)")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="stop a notebook that takes longer in all")


def run_command(args) -> int:
    """`sftlab run`: 0 all completed, 1 a cell failed, 3 a kernel died, 4 timed out, 130 interrupted; else UserError."""
    output_dir = Path(args.output_dir or files.ROOT / "runs" / time.strftime("%Y%m%d-%H%M%S"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's stop also leaves statuses and an index
    statuses = run_notebooks(args.notebooks, dict(args.parameters), output_dir, args.profile, args.timeout)
    bad = [status for status in statuses if status["status"] != "completed"]
    print(f"{len(statuses) - len(bad)} completed, {len(bad)} not. Report: {output_dir / 'index.html'}")
    return max(EXIT_CODES[status["status"]] for status in statuses)


def plan_jobs(paths, parameters: dict, profile: str) -> dict[Path, dict]:
    """What to run: notebook -> its name, parameters as the declared types, profile and hash of its cells' sources."""
    books = {path: read_notebook(path) for given in paths for path in find_notebooks(Path(given))}
    stems = [path.stem for path in books]
    for stem in stems:
        if stems.count(stem) > 1 or stem == "index":
            raise UserError(f"{stem}.ipynb: each notebook needs a name of its own, other than index, for its outputs.")
    known = {name for declared, _ in books.values() for name in declared}
    for name, value in parameters.items():
        refuse_token(value, f"parameter {name}")  # the executed notebook would keep it
        if name not in known:
            there = f"Declared: {', '.join(sorted(known))}." if known else "It declares none."
            raise UserError(f"{', '.join(stems)}: no parameter {name!r}.{near_match(name, known)} {there}")
    jobs = {}
    for path, (declared, digest) in books.items():
        given = {name: value for name, value in parameters.items() if name in declared}
        values = {name: coerce_parameter(name, value, declared[name]) for name, value in given.items()}
        for name in values.keys() & FIELDS.keys():
            check_value(FIELDS[name], values[name])
        own = resolve_profile(values.get("profile", profile))
        values |= {"profile": own} if "profile" in declared else {}
        jobs[path] = {"notebook": path.stem, "parameters": values, "profile": own, "source_sha256": digest}
    return jobs


def find_notebooks(path: Path) -> list[Path]:
    found = sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        near = near_match(path.name, [other.name for other in path.parent.glob("*.ipynb")])
        raise UserError(f"{path}: no notebook there.{near}")
    return [notebook.resolve() for notebook in found]


def read_notebook(path: Path) -> tuple[dict[str, str], str]:
    """The parameters that a notebook declares, name -> annotation, and a hash of its cells without their outputs."""
    from nbformat import ValidationError
    from papermill import inspect_notebook
    from papermill.exceptions import PapermillException
    from papermill.iorw import load_notebook_node

    try:
        notebook = load_notebook_node(str(path))
        found = inspect_notebook(notebook)
    except (AttributeError, ValueError, ValidationError, PapermillException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: can't be read as a Python notebook: {reason}") from error
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    declared = {name: facts["inferred_type_name"] for name, facts in found.items()}
    return declared, hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def coerce_parameter(name: str, value: object, annotation: str) -> object:
    """The value as annotated; without an annotation, or with another one, as JSON, or as the text that it is."""
    if annotation in KINDS:
        return coerce(name, value, KINDS[annotation])
    with contextlib.suppress(TypeError, ValueError):
        return json.loads(value)
    return value
