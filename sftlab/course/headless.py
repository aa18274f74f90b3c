"""Headless runs of notebooks with papermill: parameters are checked first, and every way to end has its name.

Papermill alone passes unknown parameters on with a warning, and takes `sys.exit(0)` and a dead kernel for success. Here a
notebook ends as completed, failed, dead kernel, timed out or interrupted. Each leaves NAME.ipynb, NAME.html and, written
last, NAME.json with its status, the cell that ended it and the error; all together leave index.html.

    sftlab run notebooks/04_first_sft.ipynb -p max_steps 50 --profile smoke
"""

import ast
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
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
PER_NOTEBOOK = "SFTLAB_RUN_DIR"  # of the environment; libraries read the rest of it once, when they are imported
SECONDS = 60  # for a kernel to forget its last notebook


class Kernel:
    """A kernel for one notebook after the other, of which only the first waits until the libraries are loaded.

    Each notebook finds what a new kernel would have: no names, its folder, its environment, and new seeds. What a notebook
    changes in the libraries themselves stays for the next.
    """

    def __init__(self):
        self.manager, self.environment = None, {}

    def prepare(self, folder: Path, environment: dict[str, str]):
        """A kernel manager for papermill: that of the last notebook, or a new one if that has ended or read other settings."""
        from jupyter_client import AsyncKernelManager
        from jupyter_core.utils import run_sync

        class Manager(AsyncKernelManager):
            def client(self, **options):
                self.last_client = super().client(**options)
                return self.last_client

        shared = {name: value for name, value in environment.items() if name != PER_NOTEBOOK}
        if self.manager and (shared != self.environment or not self._renew(folder, environment)):
            self.close()
        if not self.manager:
            self.manager, self.environment = Manager(kernel_name="python3"), shared
            quiet = ["--log-level=50"]  # the kernel's own log would break the progress bar
            run_sync(self.manager.start_kernel)(cwd=str(folder), env=environment, extra_arguments=quiet)
        return self.manager

    def release(self) -> None:
        """Close the connection of the notebook that has ended; nbclient leaves it open where the kernel isn't its own."""
        if client := getattr(self.manager, "last_client", None):
            client.stop_channels()

    def close(self) -> None:
        """End the kernel, if there is one; the next notebook gets a new one."""
        from jupyter_core.utils import run_sync

        self.release()
        if self.manager and self.manager.has_kernel:
            run_sync(self.manager.shutdown_kernel)()
        self.manager = None

    def _renew(self, folder: Path, environment: dict[str, str]) -> bool:
        """Have the kernel forget its last notebook; False where it doesn't answer."""
        from jupyter_client import BlockingKernelClient

        code = f"from sftlab.course import headless; headless.forget_notebook({str(folder)!r}, {environment!r})"
        client = BlockingKernelClient(**self.manager.get_connection_info(session=True))
        client.start_channels(stdin=False)
        try:
            client.wait_for_ready(SECONDS)
            return client.execute(code, silent=True, reply=True, timeout=SECONDS)["content"]["status"] == "ok"
        except (RuntimeError, TimeoutError):  # it has died, or is at work on something that doesn't end
            return False
        finally:
            client.stop_channels()


def forget_notebook(folder: str, environment: dict[str, str]) -> None:
    """In the kernel: forget the last notebook, and begin as a new kernel would in this folder and environment."""
    from IPython import get_ipython

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    get_ipython().reset(new_session=True)
    gc.collect()  # a model and its trainer refer to each other
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
        sys.modules["torch"].cuda.empty_cache()


def run_notebook(
    path: Path,
    job: dict,
    output_dir: Path,
    kernel: Kernel,
    timeout: float | None = None,
    label: str = "",
    plotly: str = "plotly.min.js",
) -> dict:
    """Run one notebook, write NAME.ipynb, NAME.html and last NAME.json into the new folder, and return its content.

    job: what NAME.json says of the input, as `plan_jobs` has it; timeout: seconds for the whole notebook; label: of the
    progress bar, which is shown if there is one; plotly: where the page finds plotly.js. What goes wrong in the notebook is a
    status, not an exception. The kernel is left to the next notebook only if this one completes.
    """
    output, start = output_dir / f"{path.stem}.ipynb", time.monotonic()
    environment = os.environ | {PER_NOTEBOOK: str(output_dir), "SFTLAB_PROFILE": job["profile"]}
    environment["TQDM_DISABLE"] = "1"  # a bar that nobody sees moving leaves a line for each step
    if job["parameters"].get("model_name", "tiny-base") == "tiny-base" and job["profile"] != "gpu":
        environment["HF_HUB_OFFLINE"] = "1"  # a slow network must not hold up a model that needs none
    status, error = execute(path, output, job["parameters"], environment, kernel, timeout, label)
    ended = find_end(output, status, error)
    if output.exists():
        try:
            export_html(output, output.with_suffix(".html"), plotly)
        except Exception as problem:  # any of nbconvert's many parts: a page that is missing must not lose the status
            print(f"{path.stem}: no HTML page: {type(problem).__name__}: {problem}")
    kernel.release() if ended["status"] == "completed" else kernel.close()
    facts = job | ended | {"seconds": round(time.monotonic() - start, 1)}
    files.write_json(output.with_suffix(".json"), facts)
    if facts["status"] != "completed":
        where = "" if facts["cell"] is None else f" in cell {facts['cell'] + 1}"
        shown = "\n".join([*facts["cell_source"].splitlines()[:6], "", *facts["error"].splitlines()[-6:]])
        print(f"{path.stem}: {facts['status']}{where}\n{textwrap.indent(shown, '    ')}")
    return facts


def escape_braces(path: Path) -> str:
    """The path as papermill takes it: it would fill in names in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def execute(
    path: Path, output: Path, parameters: dict, environment: dict, kernel: Kernel, timeout: float | None, label: str
) -> tuple[str, str]:
    """Papermill's run as a status and an error's text; `find_end` looks closer."""
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill import PapermillExecutionError, execute_notebook

    options = {"kernel_name": "python3", "language": "python", "cwd": path.parent, "start_timeout": 120}
    options |= {"store_widget_state": False}  # GitHub refuses stored widget states
    options["progress_bar"] = {"desc": label} if label else False
    if timeout:  # nbclient asks before each cell, so what is left makes a limit for the whole notebook
        end = time.monotonic() + timeout
        options["timeout_func"] = lambda cell: max(1, math.ceil(end - time.monotonic()))
    try:
        manager = kernel.prepare(path.parent, environment)
        execute_notebook(escape_braces(path), escape_braces(output), parameters, km=manager, **options)
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


def find_end(output: Path, status: str, error: str) -> dict:
    """status, error, cell (a number in the source notebook, from 0) and cell_source, as the executed notebook shows them.

    It gets the error of a cell that was cut short.
    """
    import nbformat
    from papermill.execute import ERROR_MARKER_TAG, remove_error_markers

    ended = {"status": status, "cell": None, "cell_source": ""}
    ended["error"] = "\n".join(ANSI_COLOUR.sub("", error).strip().splitlines()[-15:])
    try:
        notebook = nbformat.read(output, as_version=4)
    except (FileNotFoundError, ValueError):  # papermill was stopped before or while it wrote
        return ended
    raised, added = notebook.metadata.papermill.get("exception"), {ERROR_MARKER_TAG, "injected-parameters"}
    own = [cell for cell in notebook.cells if not added & set(cell.metadata.get("tags", []))]
    started = [number for number, cell in enumerate(own) if cell.metadata.get("papermill", {}).get("start_time")]
    marked = len(notebook.cells) > len(remove_error_markers(notebook).cells)
    if marked and not raised:  # the error was in a cell tagged raises-exception
        files.write_text(output, nbformat.writes(notebook))
        return ended | {"status": "completed", "error": ""}
    if status == "completed" and raised:
        error = "SystemExit: the cell called sys.exit() or exit(), and the cells below did not run."
        ended |= {"status": "failed", "error": error}
    if ended["status"] == "completed" or not started:
        return ended
    cell = own[started[-1]]
    if status not in ("completed", "failed") and cell.cell_type == "code":
        cell.outputs.append(nbformat.v4.new_output("stream", name="stderr", text=error + "\n"))
        files.write_text(output, nbformat.writes(notebook))
    return ended | {"cell": started[-1], "cell_source": cell.source}


def run_notebooks(paths, parameters: dict, output_dir, *, profile="", timeout=None) -> list[dict]:
    """Run notebooks one after the other and return their statuses, as NAME.json holds them.

    `timeout` is in seconds for each whole notebook. Raises UserError, before anything is written, for input that can't work.
    """
    jobs, output_dir = plan_jobs(paths, parameters, resolve_profile(profile)), Path(output_dir).resolve()
    if output_dir.is_file() or output_dir.is_dir() and any(output_dir.iterdir()):
        raise place_error(output_dir, "is there and not empty")
    if timeout is not None and not timeout > 0:
        raise UserError(f"timeout: {timeout:g} is no time to run in; give seconds, such as 600.")
    output_dir.mkdir(parents=True, exist_ok=True)
    statuses = []
    for number, (path, job) in enumerate(jobs.items(), 1):
        with contextlib.closing(Kernel()) as kernel:
            statuses.append(run_notebook(path, job, output_dir, kernel, timeout, f"{number}/{len(jobs)} {path.stem}"))
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
    options = {"profile": args.profile, "timeout": args.timeout}
    try:
        statuses = run_notebooks(args.notebooks, dict(args.parameters), output_dir, **options)
    except KeyboardInterrupt:
        return EXIT_CODES["interrupted"]
    bad = [status for status in statuses if status["status"] != "completed"]
    print(f"{len(statuses) - len(bad)} completed, {len(bad)} not. Report: {output_dir / 'index.html'}")
    return max(EXIT_CODES[status["status"]] for status in statuses)


def plan_jobs(paths, parameters: dict, profile: str) -> dict[Path, dict]:
    """What to run: notebook -> its name, parameters as the declared types, profile and hash of its cells' sources."""
    declared = {path: read_declared(path) for given in paths for path in find_notebooks(Path(given))}
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
        values = {
            name: coerce_parameter(name, value, *kinds[name]) for name, value in parameters.items() if name in kinds
        }
        for name in values.keys() & FIELDS.keys():
            check_value(FIELDS[name], values[name])
        own = resolve_profile(values.get("profile", profile))
        values |= {"profile": own} if "profile" in kinds else {}
        cells = [(cell["cell_type"], "".join(cell["source"])) for cell in files.read_json(path)["cells"]]
        digest = hashlib.sha256(json.dumps(cells).encode()).hexdigest()  # not of the outputs, which a look may change
        jobs[path] = {"notebook": path.stem, "parameters": values, "profile": own, "source_sha256": digest}
    return jobs


def find_notebooks(path: Path) -> list[Path]:
    found = sorted(path.glob("*.ipynb")) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        near = near_match(path.name, [other.name for other in path.parent.glob("*.ipynb")])
        raise UserError(f"{path}: no notebook there.{near}")
    return [notebook.resolve() for notebook in found]


def read_declared(path: Path) -> dict[str, tuple[str, str]]:
    """Name -> (annotation, default) from the cell tagged `parameters`, as papermill reads it."""
    from nbformat import ValidationError
    from papermill import inspect_notebook
    from papermill.exceptions import PapermillException

    try:
        found = inspect_notebook(escape_braces(path))
        if "cells" not in files.read_json(path):
            raise ValueError("its format is older than nbformat 4; open and save it in JupyterLab")
    except (ValueError, ValidationError, PapermillException) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: can't be read as a Python notebook: {reason}") from error
    return {name: (facts["inferred_type_name"], facts["default"]) for name, facts in found.items()}


def coerce_parameter(name: str, value: object, annotation: str, default: str) -> object:
    """The value as annotated, else as the type of the default; of any other type as JSON, or as the text that it is."""
    if annotation == "None":  # papermill's word for no annotation
        with contextlib.suppress(ValueError, SyntaxError):
            annotation = type(ast.literal_eval(default)).__name__
    if annotation in KINDS:
        return coerce(name, value, KINDS[annotation])
    with contextlib.suppress(TypeError, ValueError):
        value = json.loads(value)
    if annotation.lower().startswith("list") and not isinstance(value, list):
        raise UserError(f'{name}: {value!r} is no list. Write it like [4, 16] or ["q_proj", "v_proj"].')
    return value
