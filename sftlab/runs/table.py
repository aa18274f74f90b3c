"""All runs of a folder: a table in the terminal (`sftlab runs`), and in a notebook one to choose from and to compare.

sftlab runs
sftlab runs runs/lab --follow
"""

import time
from pathlib import Path

from sftlab.config.configs import RunsConfig
from sftlab.errors import UserError
from sftlab.runs import background, panel, state
from sftlab.runs.state import Run

FACTS = ("step", "time left", "loss", "validation loss", "tokens per second")
HEADS = ("run", "status", *FACTS, "began", "configuration")
LOGGED = ("loss", "eval_loss", "learning_rate", "grad_norm")  # of an entry of the log
NOTHING = "—"  # in the list of runs to compare with


def find_named(folder: str | Path) -> dict[str, Run]:
    """The runs of a folder by their paths in it."""
    return {str(run.folder.relative_to(Path(folder).absolute())): run for run in state.find(folder)}


def list_rows(runs: dict[str, Run]) -> list[tuple[str, ...]]:
    """The lines of a table under HEADS."""
    rows = []
    for name, run in runs.items():
        facts = state.list_facts(run)
        began = time.strftime("%m-%d %H:%M", time.localtime(run.started)) if run.started else ""
        rows.append((name, run.status, *(facts[fact] for fact in FACTS), began, run.config_hash))
    return rows


def format_table(folder: str | Path) -> str:
    """The runs of a folder as text, a line for each; why one ended is below."""
    found = find_named(folder)
    if not found:
        return f"no runs in {folder}"
    rows = [HEADS, *list_rows(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines + [f"{name}: {run.reason}" for name, run in found.items() if run.reason])


def make_list(folder: str | Path):
    """A box with all runs of a folder in a table, a list to choose one from, another to compare it with, and its panel."""
    import ipywidgets

    table, place = ipywidgets.HTML(), ipywidgets.VBox()
    chosen = ipywidgets.Dropdown(description="run", layout={"width": "max-content"})
    other = ipywidgets.Dropdown(description="compare with", style={"description_width": "initial"})
    again = ipywidgets.Button(description="Look again", tooltip="for runs that have begun since")
    found = {}

    def update_panel(_=None) -> None:
        for old in place.children:
            panel.close(old)
        run, beside = found.get(chosen.value), found.get(other.value)
        place.children = [panel.make_panel(run, None if beside is run else beside)] if run else []

    def update_table(_=None) -> None:
        found.clear()
        found.update(find_named(folder))
        table.value = str(panel.load_html().table(HEADS, list_rows(found), folder))
        for field, options in ((chosen, list(found)), (other, [NOTHING, *found])):
            if list(field.options) != options:
                kept = field.value
                field.options = options
                if kept in options:
                    field.value = kept

    update_table()
    update_panel()
    chosen.observe(update_panel, "value")
    other.observe(update_panel, "value")
    again.on_click(update_table)
    return ipywidgets.VBox([table, ipywidgets.HBox([chosen, other, again]), place])


def run_command(config: RunsConfig) -> int:
    """`sftlab runs`: list all, or stop, resume or follow one. Returns the exit code."""
    if config.stop:
        background.stop(find_run(config.stop))
        print(f"asked {config.stop} to stop; it writes a checkpoint first")
    if config.resume:
        print(state.format_run(background.resume(find_run(config.resume))))
    if config.follow:
        return follow(find_run(config.follow))
    if not (config.stop or config.resume):
        print(format_table(config.folder or state.find_place()))
    return 0


def find_run(folder: str) -> Run:
    """The run of a folder. Raises UserError where there is none."""
    run = state.read(folder)
    if run.status == "none":
        raise UserError(f"{folder}: no run there. `sftlab runs` lists those in runs, `sftlab runs FOLDER` others.")
    return run


def follow(run: Run) -> int:
    """Print the log of a run as it comes, until the run ends, or Ctrl-C, which the run doesn't notice."""
    printed = max(0, len(run.history) - 10)
    while True:
        run = state.read(run.folder)
        for entry in run.history[printed:]:
            if numbers := ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name in LOGGED):
                print(f"step {entry['step']}: {numbers}", flush=True)
        printed = len(run.history)
        if run.status not in state.ACTIVE:
            print(state.format_run(run))
            return 0 if run.status == "completed" else 1
        time.sleep(0.5)


def attach(folder: str | Path | None = None):
    """The panel of a run, by its folder, or of all runs in a folder, to choose from; default: those in `state.find_place`.

    Without a reader (papermill, nbval) the same is printed, with the curve as a picture, and None returned.
    """
    reader, run = panel.has_reader(), state.read(folder) if folder is not None else None
    if run and run.status != "none":
        return panel.make_panel(run) if reader else panel.print_run(run)
    place = folder or state.find_place()
    return make_list(place) if reader else print(format_table(place))
