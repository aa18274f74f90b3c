"""Runs as one looks at them: a table in the terminal (`sftlab runs`), a panel in a notebook, with buttons to stop and resume.

A panel only reads files: it may be closed and made again at any time, and several may show the same run. Its updates
continue when the cell has ended, and end with the run or the panel.

    from sftlab import runs; runs.attach("runs/first")
"""

import functools
import threading
import time
from pathlib import Path

from sftlab import pages, plots
from sftlab.config.configs import RunsConfig
from sftlab.errors import UserError
from sftlab.runs import background, state
from sftlab.train import folder as run_folder

EVERY = 1.0  # seconds from update to update
FACTS = ["step", "time left", "loss", "validation loss", "tokens per second"]


def format_table(folder: str | Path) -> str:
    """The runs of a folder as text, the one that began last first, a line for each; why one ended is below."""
    from pandas import DataFrame

    found = {str(run.folder.relative_to(Path(folder).absolute())): run for run in state.find(folder)}
    if not found:
        return f"no runs in {folder}"
    rows = []
    for name, run in found.items():
        began = time.strftime("%m-%d %H:%M", time.localtime(run.started)) if run.started else ""
        rows.append(state.list_facts(run) | {"run": name, "status": run.status, "began": began})
    table = DataFrame(rows)[["run", "status", *FACTS, "began"]].to_string(index=False)
    return "\n".join([table, *(f"{name}: {run.reason}" for name, run in found.items() if run.reason)])


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
    """The panel of a run, by its folder; of a folder with several, a table, and the panel of the one that began last.

    Default: those in `state.find_place`. Without a reader (papermill, nbval) the panel is printed, with the curve as a picture,
    and None returned.
    """
    place = folder or state.find_place()
    run = state.read(place)
    if run.status == "none":
        print(format_table(place))
        if not (found := state.find(place)):
            return None
        run = found[0]
    if has_reader():
        return make_panel(run)
    print(state.format_run(run))
    if run.find_last("loss") is not None:
        plots.show(plots.loss_curve(run.history))


def draw(figure, history: list[dict]) -> None:
    """Draw the losses of a log into a figure widget in place."""
    with figure.batch_update():
        for trace, name in zip(figure.data, ("loss", "eval_loss"), strict=True):
            points = [entry for entry in history if name in entry]
            trace.x, trace.y = [entry["step"] for entry in points], [entry[name] for entry in points]
    figure._repr_mimebundle_()  # also puts the data into the widget's state, which a page that is reloaded asks for


def make_panel(run: state.Run):
    """An ipywidgets box that follows a run. `box.run`: the run as read last."""
    import ipywidgets
    from plotly.graph_objects import FigureWidget

    status, facts, message = (ipywidgets.HTML() for _ in range(3))
    chart = FigureWidget(plots.loss_curve([{"step": 0, "loss": 0, "eval_loss": 0}]))
    html = pages.load_template("sftlab.runs", "panel.html.j2").module
    stop = ipywidgets.Button(description="Stop", tooltip="write a checkpoint after the present step, then end")
    resume = ipywidgets.Button(description="Resume", tooltip="from the last checkpoint")
    box = ipywidgets.VBox([status, facts, ipywidgets.HBox([stop, resume]), message, chart])
    box.run, box.drawn = run, None

    def update() -> None:
        now = box.run = state.read(run.folder)
        active = now.status in state.ACTIVE
        status.value = str(html.status(state.format_status(now), now.status in ("failed", "killed")))
        facts.value = str(html.facts(now.folder.name, now.step, now.max_steps, active, state.list_facts(now)))
        stop.disabled = not active or "asked" in now.progress
        resume.disabled = now.status not in ("interrupted", "failed", "killed") or not run_folder.find_last(now.folder)
        if box.drawn != now.history:
            draw(chart, now.history)
            box.drawn = now.history

    def follow() -> None:
        while box.comm is not None and box.run.status in state.ACTIVE:
            time.sleep(EVERY)
            update()

    def start() -> None:  # in a thread, because a kernel answers nothing else while a cell runs
        update()
        box.follower = threading.Thread(target=follow, name=f"panel of {run.folder.name}", daemon=True)
        box.follower.start()

    def act(action, _) -> None:
        stop.disabled, resume.disabled, message.value = True, True, ""
        try:
            action(box.run)
        except UserError as error:
            message.value = str(html.error(error))
        if not box.follower.is_alive():
            start()

    stop.on_click(functools.partial(act, background.stop))
    resume.on_click(functools.partial(act, background.resume))
    start()
    return box


def has_reader() -> bool:
    """Whether a person runs this notebook. A front-end sends with each cell whether it could ask its user something
    (`allow_stdin` of Jupyter's messages); papermill, nbval and other programs that run notebooks can't.
    """
    from IPython import get_ipython

    kernel = getattr(get_ipython(), "kernel", None)
    return bool(kernel and kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
