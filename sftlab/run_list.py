"""All runs of a folder: a table in the terminal (`sftlab runs`), and in a notebook one to choose from and to compare by.

sftlab runs
sftlab runs runs/lab --follow
"""

import json
import time
from pathlib import Path

from sftlab import pages, run_panel, run_words, runs
from sftlab.config import RunsConfig
from sftlab.options import UserError

SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm")  # of a log's entry
NOTHING = "—"  # of the list of runs to compare with


def name_run(run: runs.Run, folder: str | Path) -> str:
    return str(run.folder.relative_to(Path(folder).absolute()))


def list_rows(folder: str | Path) -> list[tuple[str, ...]]:
    return [run_words.list_row(run, name_run(run, folder)) for run in runs.find(folder)]


def make_list(folder: str | Path):
    """A box with all runs of a folder in a table, a list to choose one from, another to compare it with, and its panel."""
    found = {name_run(run, folder): run for run in runs.find(folder)}
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
            run_panel.close(old)
        run, other = found.get(chosen.value), found.get(beside.value)
        place.children = [run_panel.make_panel(run, None if other is run else other)] if run else []

    def look(_=None) -> None:
        found.clear()
        found.update({name_run(run, folder): run for run in runs.find(folder)})
        rows = list_rows(folder)
        words = pages.table(run_words.HEADS, rows) if rows else f"<p>no runs in {pages.text(folder)}</p>"
        table.value = f"{run_panel.STYLE}<div class='sftlab-run'>{words}</div>"
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
    found = runs.find(folder)
    if not found:
        return f"no runs in {folder}"
    rows = [run_words.HEADS, *(run_words.list_row(run, name_run(run, folder)) for run in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines + [f"{name_run(run, folder)}: {run.said}" for run in found if run.said])


def show_runs(config: RunsConfig) -> int:
    """`sftlab runs`: list, or stop, resume or follow one run. Returns the exit code."""
    if config.stop:
        runs.stop(choose(config.stop))
        print(f"asked {config.stop} to stop; it writes a checkpoint first")
    if config.resume:
        print(run_words.tell(runs.resume(choose(config.resume))))
    if config.follow:
        return follow(choose(config.follow))
    if config.stop or config.resume:
        return 0
    folder = config.folder or runs.find_place()
    if config.json:
        print(json.dumps([run_words.to_json(run) for run in runs.find(folder)], ensure_ascii=False, indent=2))
    else:
        print(format_table(folder))
    return 0


def choose(folder: str) -> runs.Run:
    """The run of a folder. Raises UserError where there is none."""
    run = runs.read(folder)
    if run.status == "none":
        raise UserError(f"{folder}: no run there. `sftlab runs` lists those in runs, `sftlab runs FOLDER` others.")
    return run


def follow(run: runs.Run) -> int:
    """Print the log of a run as it comes, until the run ends or Ctrl-C, which the run doesn't notice."""
    shown = max(0, len(run.history) - 10)
    while True:
        run = runs.read(run.folder)
        for entry in run.history[shown:]:
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in entry.items() if name in SHOWN)
            if numbers:
                print(f"step {entry['step']}: {numbers}", flush=True)
        shown = len(run.history)
        if run.status not in runs.ACTIVE:
            print(run_words.tell(run))
            return 0 if run.status == "completed" else 1
        time.sleep(0.5)
