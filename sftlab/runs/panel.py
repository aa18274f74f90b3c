"""The panel of a run in a notebook: its state, its curves and its log as they come, and buttons to stop and resume it.

A panel only reads files: it may be closed and made again at any time, and several may show the same run. Its updates
continue when the cell has ended, and end with the run or the panel.

    from sftlab import runs; runs.attach("runs/first")
"""

import threading
import time

from sftlab import pages, plots
from sftlab.errors import UserError
from sftlab.runs import background, logs, state
from sftlab.train import folder as run_folder

EVERY = 1.0  # seconds from update to update
LAST_LINES = 20  # of the log
MOST_POINTS = 1000  # of a curve
STYLE = """<style>
.sftlab-run{color:var(--jp-ui-font-color1);font-size:var(--jp-ui-font-size1);line-height:1.5}
.sftlab-run progress{width:100%;height:1rem;accent-color:var(--jp-brand-color1)}
.sftlab-facts{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.3rem 0}.sftlab-facts span{display:block}
.sftlab-facts b{font-variant-numeric:tabular-nums}
.sftlab-run pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:var(--jp-code-font-size);line-height:1.4;margin:0;padding:.4rem;
border:1px solid var(--jp-border-color1);color:var(--jp-content-font-color1);background:var(--jp-layout-color1)}
.sftlab-run th,.sftlab-run td{text-align:left;padding:.2rem 1rem .2rem 0}.sftlab-run .sftlab-wrong{border-left:4px solid var(--jp-error-color1);padding-left:.6rem}</style>"""


def wrap(html: str, style: str = "") -> str:
    return f"{style}<div class='sftlab-run'>{html}</div>"


def write_status(run: state.Run) -> str:
    """The sentence on a run's state, which a screen reader reads when it changes."""
    mark = "sftlab-wrong" if run.status in ("failed", "killed") else ""
    sentence = pages.text(state.format_status(run))
    return wrap(f"<p role='status' aria-live='polite' class='{mark}'><b>{sentence}</b></p>", STYLE)


def write_error(text: str) -> str:
    return wrap(f"<p role='alert' class='sftlab-wrong'>{pages.text(text)}</p>", STYLE)


def write_facts(run: state.Run) -> str:
    """The progress bar and the figures of a run."""
    facts = "".join(
        f"<div><span>{pages.text(name)}</span> <b>{pages.text(text)}</b></div>" for name, text in state.list_facts(run)
    )
    value = "" if run.status in state.ACTIVE else " value='0'"  # without a value it moves: at work, the end not known
    if run.max_steps:
        value = f" max='{run.max_steps}' value='{run.step}'"
    bar = f"<progress aria-label='steps of {pages.text(run.folder.name)}'{value}></progress>"
    return wrap(f"{bar}<div class='sftlab-facts'>{facts}</div>")


def write_log(run: state.Run) -> str:
    """The last lines that a background run printed, without the Trainer's numbers, which are in the chart."""
    place = logs.find_logs(run.folder)
    lines = logs.read_end(place / logs.LOG, run.attempt.get("offset", 0)).strip("\n").splitlines()
    lines = [line for line in lines if not (line.startswith("{'") and line.endswith("'}"))][-LAST_LINES:]
    title = pages.text(f"The last lines of {place.name}/{logs.LOG}")
    return wrap(f"{title}<pre>{pages.text(chr(10).join(lines))}</pre>") if lines else ""


def thin_out(history: list[dict]) -> list[dict]:
    """About as many entries of a log as a chart has room for, with all validation losses, the first and the last entry."""
    every, ends = -(-len(history) // MOST_POINTS) or 1, (1, len(history))
    numbered = enumerate(history, 1)
    return [entry for number, entry in numbered if "eval_loss" in entry or number % every == 0 or number in ends]


def draw(figure, histories: dict[str, list]) -> None:
    """Draw losses into a figure widget in place. histories: name of a run -> entries of its log; one alone has no name."""
    thin = {name: thin_out(history) for name, history in histories.items()}
    try:
        new = plots.loss_curve(thin if len(thin) > 1 else next(iter(thin.values()))).data
    except ValueError:  # no loss was logged yet
        new = ()
    if [trace.name for trace in figure.data] == [trace.name for trace in new]:
        with figure.batch_update():
            for trace, now in zip(figure.data, new, strict=True):
                trace.x, trace.y, trace.mode = now.x, now.y, now.mode
    else:
        figure.data = ()
        figure.add_traces(new)
    figure._repr_mimebundle_()  # also puts the data into the widget's state, which a page that is reloaded asks for


def make_chart():
    """An empty chart of losses, to `draw` into."""
    from plotly.graph_objects import FigureWidget

    return FigureWidget(layout=plots.lines([], {}, "step", "loss", "Loss").layout)


def print_run(run: state.Run) -> None:
    """Print a run as text and a picture, for a notebook without a reader."""
    print(state.format_run(run))
    if run.find_last("loss") is not None:
        plots.show(plots.loss_curve(run.history))


def can_resume(run: state.Run) -> bool:
    return run.status in ("interrupted", "failed", "killed") and run_folder.find_last(run.folder) is not None


def make_panel(run: state.Run, other: state.Run | None = None):
    """An ipywidgets box that follows a run, with the losses of another one in its chart. `box.run`: the run as read last."""
    import ipywidgets

    status, facts, message, log = (ipywidgets.HTML() for _ in range(4))
    chart = make_chart()
    stop = ipywidgets.Button(description="Stop", tooltip="write a checkpoint after the present step, then end")
    resume = ipywidgets.Button(description="Resume", tooltip="from the last checkpoint")
    box = ipywidgets.VBox([status, facts, ipywidgets.HBox([stop, resume]), message, chart, log])
    box.run, box.follower, drawn, lock = run, None, [], threading.Lock()

    def update() -> None:
        with lock:
            box.run = now = state.read(run.folder)
            for widget, text in ((status, write_status(now)), (facts, write_facts(now)), (log, write_log(now))):
                if widget.value != text:  # a selection, or the place of a screen reader, stays
                    widget.value = text
            stop.disabled = now.status not in state.ACTIVE or "asked" in now.attempt
            resume.disabled = not can_resume(now)
            histories = {name_run(now, other): now.history}
            if other is not None:
                histories[name_run(other, now)] = state.read(other.folder).history
            if drawn != [histories]:
                draw(chart, histories)
                drawn[:] = [histories]

    def act(action) -> None:
        message.value = ""
        try:
            action(box.run)
        except UserError as error:
            message.value = write_error(str(error))
        follow(box, update, message)

    stop.on_click(lambda _: act(background.stop))
    resume.on_click(lambda _: act(background.resume))
    follow(box, update, message)
    return box


def name_run(run: state.Run, other: state.Run | None) -> str:
    """The name of a run in a chart with another."""
    same = other is not None and run.folder.name == other.folder.name
    return f"{run.folder.parent.name}/{run.folder.name}" if same else run.folder.name


def follow(box, update, message) -> None:
    """Call `update` now and each second, in a thread, until the run has ended or the box is closed. message: for errors.

    A thread, because a kernel answers nothing else while a cell runs. A box has one at most.
    """

    def try_update() -> bool:
        try:
            update()
        except Exception as error:  # a thread would lose it
            message.value = write_error(f"The panel has stopped: {error!r}. The run continues; make the panel again.")
            return False
        return box.run.status in state.ACTIVE

    def repeat() -> None:
        while box.comm is not None and box.follower is threading.current_thread() and try_update():
            time.sleep(EVERY)

    if try_update():
        box.follower = threading.Thread(target=repeat, name=f"panel of {box.run.folder.name}", daemon=True)
        box.follower.start()  # an earlier one sees that it was replaced, and ends


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
