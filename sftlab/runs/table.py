"""All runs of a folder: a table in the terminal (`sftlab runs`), and in a notebook one to choose from.

sftlab runs
sftlab runs runs/lab --follow
"""

import time
from pathlib import Path

from sftlab import plots
from sftlab.config.configs import RunsConfig
from sftlab.runs import background, panel, state
from sftlab.runs.state import Run

FACTS = ("step", "time left", "loss", "validation loss", "tokens per second")
HEADS = ("run", "status", *FACTS, "began", "configuration")


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
    """A box with all runs of a folder in a table, a list to choose one from, and its panel."""
    import ipywidgets

    found, place = find_named(folder), ipywidgets.VBox()
    table = ipywidgets.HTML(str(panel.load_html().table(HEADS, list_rows(found), folder)))
    chosen = ipywidgets.Dropdown(description="run", options=list(found), layout={"width": "max-content"})

    def show_panel(_=None) -> None:
        for old in place.children:
            panel.close(old)
        place.children = [panel.make_panel(found[chosen.value])] if found else []

    show_panel()
    chosen.observe(show_panel, "value")
    return ipywidgets.VBox([table, chosen, place])


def run_command(config: RunsConfig) -> int:
    """`sftlab runs`: list all, or stop, resume or follow one. Returns the exit code."""
    if config.stop:
        background.stop(state.read(config.stop))
        print(f"asked {config.stop} to stop; it writes a checkpoint first")
    if config.resume:
        print(state.format_run(background.resume(state.read(config.resume))))
    if config.follow:
        run = background.wait(state.read(config.follow))  # which doesn't notice Ctrl-C
        print(state.format_run(run))
        return 0 if run.status == "completed" else 1
    if not (config.stop or config.resume):
        print(format_table(config.folder or state.find_place()))
    return 0


def attach(folder: str | Path | None = None):
    """The panel of a run, by its folder, or of all runs in a folder, to choose from; default: those in `state.find_place`.

    Without a reader (papermill, nbval) the same is printed, with the curve as a picture, and None returned.
    """
    place = folder or state.find_place()
    run = state.read(place)
    if panel.has_reader():
        return make_list(place) if run.status == "none" else panel.make_panel(run)
    if run.status == "none":
        return print(format_table(place))
    print(state.format_run(run))
    if run.find_last("loss") is not None:
        plots.show(plots.loss_curve(run.history))
