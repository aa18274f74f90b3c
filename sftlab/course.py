"""Headless runs of the course's notebooks with papermill: parameters checked first, every failure named for what it is.

Papermill alone passes unknown parameters on with a warning and takes `sys.exit(0)` for success. Here each notebook
leaves NAME.ipynb, NAME.html and, written last, NAME.json with its status; all together leave index.html.

    sftlab run notebooks/04_first_sft.ipynb -p max_steps 50 --profile smoke
"""

import ast
import contextlib
import hashlib
import json
import numbers
import os
import re
import signal
import time
from pathlib import Path

from sftlab import files, pages
from sftlab.config import FIELDS
from sftlab.execute import papermill_path, run_notebook
from sftlab.options import UserError, check_value, coerce, near_match, place_error, refuse_token
from sftlab.report import write_index

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ("smoke", "cpu", "gpu")
KINDS = {"bool": bool, "int": int, "float": float, "str": str, "list": list}
MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "*_$~[]\\"}  # what Markdown would read in a table's code
EXIT_CODES = {"completed": 0, "failed": 1, "dead kernel": 3, "timed out": 4, "interrupted": 130}


def start(name: str, profile: str = "") -> tuple[str, Path]:
    """The set-up of every notebook: its profile and its work folder; the libraries' chatter is turned down."""
    from sftlab import models

    models.quiet_libraries()
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
    """A table for notebooks, as Markdown, which lines up Japanese too; `…` in a cell is code, line breaks are ↵."""
    from IPython.display import Markdown

    def show(cell) -> str:
        """A cell as text: else <s> would be struck out, and a data row's script would run in an exported page."""
        escaped = pages.text(cell).replace("\n", "↵").replace("|", "&#124;")
        # code as HTML, since Markdown's own shows the &lt; of a < as it stands; what is left of ` begins no code
        code = re.sub("`([^`]+)`", lambda found: f"<code>{found[1].translate(MARKS)}</code>", escaped)
        return code.replace("`", "&#96;")

    lines = [header, ["---"] * len(header), *rows]
    return Markdown("\n".join("| " + " | ".join(map(show, line)) + " |" for line in lines))


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
    again = "go on in --output-dir: skip what is completed with the same parameters"
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
