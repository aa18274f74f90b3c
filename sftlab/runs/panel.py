"""The panel of a run in a notebook: its state, its curves and its log as they come, and buttons to stop and resume it.

A panel only reads files: it may be closed and made again at any time, and several may show the same run. Its updates
continue when the cell has ended, and end with the run or the panel.

    from sftlab import runs; runs.attach("runs/first")
"""

import functools
import threading
import time

from sftlab import pages, plots
from sftlab.errors import UserError
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder

EVERY = 1.0  # seconds from update to update
LAST_LINES = 20  # of the log
MOST_POINTS = 1000  # of a curve, about


def load_html():
    """The macros of panel.html.j2."""
    return pages.load_template("sftlab.runs", "panel.html.j2").module


def write_html(run: state.Run) -> list[str]:
    """A run's status, its figures with a progress bar, and the end of what it printed in the background."""
    html, place = load_html(), logs.find_logs(run.folder)
    wrong, active = run.status in ("failed", "killed"), run.status in state.ACTIVE
    lines = logs.read_end(place / logs.LOG).strip("\n").splitlines() if "start" in run.progress else []
    lines = [line for line in lines if not line.startswith("{'")]  # entries of the trainer's log: they are in the chart
    parts = (
        html.status(state.format_status(run), wrong),
        html.facts(run.folder.name, run.step, run.max_steps, active, state.list_facts(run)),
        html.log(f"{place.name}/{logs.LOG}", lines[-LAST_LINES:]),
    )
    return [str(part) for part in parts]


def draw(figure, history: list[dict]) -> None:
    """Draw the losses of a log into a figure widget in place: all of the validation, of the others about MOST_POINTS."""
    every = -(-len(history) // MOST_POINTS) or 1
    thin = [entry for number, entry in enumerate(history) if "eval_loss" in entry or number % every == 0]
    with figure.batch_update():
        for trace, name in zip(figure.data, ("loss", "eval_loss"), strict=True):
            points = [entry for entry in thin if name in entry]
            trace.x, trace.y = [entry["step"] for entry in points], [entry[name] for entry in points]
    figure._repr_mimebundle_()  # also puts the data into the widget's state, which a page that is reloaded asks for


def make_panel(run: state.Run):
    """An ipywidgets box that follows a run. `box.run`: the run as read last."""
    import ipywidgets
    from plotly.graph_objects import FigureWidget

    status, facts, message, log = (ipywidgets.HTML() for _ in range(4))
    chart = FigureWidget(plots.loss_curve([{"step": 0, "loss": 0, "eval_loss": 0}]))
    stop = ipywidgets.Button(description="Stop", tooltip="write a checkpoint after the present step, then end")
    resume = ipywidgets.Button(description="Resume", tooltip="from the last checkpoint")
    box = ipywidgets.VBox([status, facts, ipywidgets.HBox([stop, resume]), message, chart, log])
    box.run, box.drawn = run, None

    def update() -> None:
        now = box.run = state.read(run.folder)
        for widget, text in zip((status, facts, log), write_html(now), strict=True):
            if widget.value != text:  # a selection, or the place of a screen reader, stays
                widget.value = text
        stop.disabled = now.status not in state.ACTIVE or "asked" in now.progress
        ended = now.status in ("interrupted", "failed", "killed")
        resume.disabled = not (ended and run_folder.find_last(now.folder))
        if box.drawn != now.history:
            draw(chart, now.history)
            box.drawn = now.history

    def follow() -> None:
        try:
            while box.comm is not None and box.run.status in state.ACTIVE:
                time.sleep(EVERY)
                update()
        except Exception as error:  # a thread would lose it
            sentence = f"The panel has stopped: {error!r}. The run continues; make the panel again."
            message.value = str(load_html().error(sentence))

    def start() -> None:  # in a thread, because a kernel answers nothing else while a cell runs
        update()
        box.follower = threading.Thread(target=follow, name=f"panel of {run.folder.name}", daemon=True)
        box.follower.start()

    def act(action, _) -> None:
        stop.disabled, resume.disabled, message.value = True, True, ""
        try:
            action(box.run)
        except UserError as error:
            message.value = str(load_html().error(error))
        if not box.follower.is_alive():
            start()

    stop.on_click(functools.partial(act, background.stop))
    resume.on_click(functools.partial(act, background.resume))
    start()
    return box


def close(box) -> None:
    """Close a box and all in it; its thread ends."""
    for child in getattr(box, "children", ()):
        close(child)
    box.close()


def has_reader() -> bool:
    """Whether a person runs this notebook. A front-end sends with each cell whether it could ask its user something
    (`allow_stdin` of Jupyter's messages); papermill, nbval and other programs that run notebooks can't.
    """
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython import get_ipython

    shell = get_ipython()
    if not isinstance(shell, ZMQInteractiveShell):
        return False
    return bool(shell.kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
