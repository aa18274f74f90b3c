"""All runs of a folder: a table in the terminal (`sftlab runs`), and in a notebook one to choose from and to compare by.

sftlab runs
sftlab runs runs/lab --follow
"""

import json
import time
from pathlib import Path

from sftlab import pages
from sftlab.config.configs import RunsConfig
from sftlab.errors import UserError
from sftlab.runs import background, panel, state
from sftlab.runs.state import find_place, read

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm")  # of a log's entry
NOTHING = "—"  # of the list of runs to compare with


def name_run(run: state.Run, folder: str | Path) -> str:
    return str(run.folder.relative_to(Path(folder).absolute()))


def list_rows(folder: str | Path) -> list[tuple[str, ...]]:
    return [state.list_row(run, name_run(run, folder)) for run in state.find(folder)]


def make_list(folder: str | Path):
    """A box with all runs of a folder in a table, a list to choose one from, another to compare it with, and its panel."""
    found = {name_run(run, folder): run for run in state.find(folder)}
    import ipywidgets

    table = ipywidgets.HTML()
    chosen = ipywidgets.Dropdown(options=list(found), description="run", layout={"width": "max-content"})
    beside = ipywidgets.Dropdown(
        options=[NOTHING, *found], description="compare with", style={"description_width": "initial"}
    )
    again = ipywidgets.Button(description="Look again", tooltip="for runs that have begun since")
    place = ipywidgets.VBox()

    def show(_=None) -> None:
        for old in place.children:
            panel.close(old)
        run, other = found.get(chosen.value), found.get(beside.value)
        place.children = [panel.make_panel(run, None if other is run else other)] if run else []

    def look(_=None) -> None:
        found.clear()
        found.update({name_run(run, folder): run for run in state.find(folder)})
        rows = list_rows(folder)
        words = pages.table(state.HEADS, rows) if rows else f"<p>no runs in {pages.text(folder)}</p>"
        table.value = f"{panel.STYLE}<div class='sftlab-run'>{words}</div>"
        for field, options in ((chosen, list(found)), (beside, [NOTHING, *found])):
            if list(field.options) != options:
                kept = field.value
                field.options = options
                if kept in options:
                    field.value = kept

    look()
    show()
    chosen.observe(show, "value")
    beside.observe(show, "value")
    again.on_click(look)
    return ipywidgets.VBox([table, ipywidgets.HBox([chosen, beside, again]), place])


def format_table(folder: str | Path) -> str:
    """The runs of a folder as text, a line for each; why one failed stands below."""
    found = state.find(folder)
    if not found:
        return f"no runs in {folder}"
    rows = [state.HEADS, *(state.list_row(run, name_run(run, folder)) for run in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{name_run(run, folder)}: {run.said}" for run in found if run.said])


def show_runs(config: RunsConfig) -> int:
    """`sftlab runs`: list, or stop, resume or follow one run. Returns the exit code."""
    if config.stop:
        background.stop(choose(config.stop))
        print(f"asked {config.stop} to stop; it writes a checkpoint first")
    if config.resume:
        print(state.tell(background.resume(choose(config.resume))))
    if config.follow:
        return follow(choose(config.follow))
    if config.stop or config.resume:
        return 0
    folder = config.folder or state.find_place()
    if config.json:
        print(json.dumps([state.to_json(run) for run in state.find(folder)], ensure_ascii=False, indent=2))
    else:
        print(format_table(folder))
    return 0


def choose(folder: str) -> state.Run:
    """The run of a folder. Raises UserError where there is none."""
    run = state.read(folder)
    if run.status == "none":
        raise UserError(f"{folder}: no run there. `sftlab runs` lists those in runs, `sftlab runs FOLDER` others.")
    return run


def follow(run: state.Run) -> int:
    """Print the log of a run as it comes, until the run ends or Ctrl-C, which the run doesn't notice."""
    shown = max(0, len(run.history) - 10)
    while True:
        run = state.read(run.folder)
        for entry in run.history[shown:]:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name in SHOWN)
            if numbers:
                print(f"step {entry['step']}: {numbers}", flush=True)
        shown = len(run.history)
        if run.status not in state.ACTIVE:
            print(state.tell(run))
            return 0 if run.status == "completed" else 1
        time.sleep(0.5)


def attach(folder: str | Path | None = None):
    """The panel of a run, by its folder, or of all runs in a folder, to choose from; default: those in `find_place`.

    Where nobody looks on (papermill, nbval) the same is printed, with the curve as a picture, and None returned.
    """
    from sftlab.runs.panel import has_reader

    run = read(folder) if folder is not None else None
    if run and run.status != "none":
        return panel.make_panel(run) if has_reader() else panel.show_still(run)
    place = folder or find_place()
    return make_list(place) if has_reader() else print(format_table(place))
