"""The panel of a run in a notebook: where it stands, its curves and its log as they come, and buttons to stop and resume it.

A panel only looks at files: it may be closed and made again at any time, and several may show the same run. What updates
it goes on when the cell has ended, and ends with the run or the panel.

    from sftlab import runs; runs.attach("runs/first")
"""

import threading
import time

from sftlab import pages, plots
from sftlab.errors import UserError
from sftlab.runs import background, state
from sftlab.train import checkpoints

EVERY = 1.0  # seconds from update to update
LAST_LINES = 20  # of the log are shown
MOST_POINTS = 1000  # of a curve
STYLE = """<style>
.sftlab-run{color:var(--jp-ui-font-color1);font-size:var(--jp-ui-font-size1);line-height:1.5}
.sftlab-run progress{width:100%;height:1rem;accent-color:var(--jp-brand-color1)}
.sftlab-facts{display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;margin:.3rem 0}.sftlab-facts span{display:block}
.sftlab-facts b{font-variant-numeric:tabular-nums}
.sftlab-run pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:var(--jp-code-font-size);line-height:1.4;margin:0;padding:.4rem;
border:1px solid var(--jp-border-color1);color:var(--jp-content-font-color1);background:var(--jp-layout-color1)}
.sftlab-run th,.sftlab-run td{text-align:left;padding:.2rem 1rem .2rem 0}.sftlab-run .sftlab-wrong{border-left:4px solid var(--jp-error-color1);padding-left:.6rem}</style>"""


def write_status(run: state.Run) -> str:
    """The sentence on a run's state, which is read aloud when it changes."""
    wrong = run.status in ("failed", "killed")
    return (f"{STYLE}<div class='sftlab-run'><p role='status' aria-live='polite' class='{'sftlab-wrong' if wrong else ''}'>"
            f"<b>{pages.text(state.tell_status(run))}</b></p></div>")  # fmt: skip


def write_facts(run: state.Run) -> str:
    """The progress bar, and what the run has come to."""
    facts = [
        f"<div><span>{pages.text(name)}</span> <b>{pages.text(text)}</b></div>" for name, text in state.list_facts(run)
    ]
    known = (
        f" max='{run.max_steps}' value='{run.step}'"
        if run.max_steps
        else ""
        if run.status in state.ACTIVE
        else " value='0'"
    )
    return (f"<div class='sftlab-run'><progress aria-label='steps of {pages.text(run.folder.name)}'{known}></progress>"
            f"<div class='sftlab-facts'>{''.join(facts)}</div></div>")  # fmt: skip


def write_log(run: state.Run) -> str:
    """The last lines of what a run in the background wrote; the Trainer's numbers are in the chart, and left out."""
    logs = state.find_logs(run.folder)
    lines = state.read_output(logs, run.attempt.get("offset", 0)).splitlines()
    lines = [line for line in lines if not (line.startswith("{'") and line.endswith("'}"))][-LAST_LINES:]
    if not lines:
        return ""
    where = f"The last lines of {logs.name}/{state.LOG}"
    return f"<div class='sftlab-run'>{pages.text(where)}<pre>{pages.text(chr(10).join(lines))}</pre></div>"


def thin_out(history: list[dict]) -> list[dict]:
    """Of a long log about as many entries as a chart has room for, all held-out losses and the last entry among them."""
    step = -(-len(history) // MOST_POINTS) or 1
    return [
        entry
        for number, entry in enumerate(history, 1)
        if "eval_loss" in entry or number % step == 0 or number in (1, len(history))
    ]


def draw(figure, histories: dict[str, list]) -> None:
    """Put the losses of runs into a figure widget in place: name -> entries of the log. One run alone goes without its name."""
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


def show_still(run: state.Run) -> None:
    """A run as text and a picture, for where nobody looks on."""
    print(state.tell(run))
    if run.find_last("loss") is not None:
        plots.show(plots.loss_curve(run.history))


def can_resume(run: state.Run) -> bool:
    return run.status in ("interrupted", "failed", "killed") and checkpoints.find_last(run.folder) is not None


def make_panel(run: state.Run, other: state.Run | None = None):
    """An ipywidgets box that follows a run, its losses beside those of another one; `box.run`: the run as read last."""
    import ipywidgets

    status, facts, said, log = (ipywidgets.HTML() for _ in range(4))
    chart = make_chart()
    stop = ipywidgets.Button(description="Stop", tooltip="write a checkpoint after the present step, then end")
    resume = ipywidgets.Button(description="Resume", tooltip="go on from the last checkpoint")
    box = ipywidgets.VBox([status, facts, ipywidgets.HBox([stop, resume]), said, chart, log])
    box.run, box.follower, drawn, lock = run, None, [], threading.Lock()

    def update() -> None:
        with lock:
            box.run = now = state.read(run.folder)
            for widget, text in ((status, write_status(now)), (facts, write_facts(now)), (log, write_log(now))):
                if widget.value != text:  # what is selected, or read aloud, stays as it is
                    widget.value = text
            stop.disabled = now.status not in state.ACTIVE or "asked" in now.attempt
            resume.disabled = not can_resume(now)
            histories = {tell_apart(now, other): now.history}
            if other is not None:
                histories[tell_apart(other, now)] = state.read(other.folder).history
            if drawn != [histories]:
                draw(chart, histories)
                drawn[:] = [histories]

    def act(do) -> None:
        said.value = ""
        try:
            do(box.run)
        except UserError as error:
            said.value = write_wrong(str(error))
        follow(box, update, said)

    stop.on_click(lambda _: act(background.stop))
    resume.on_click(lambda _: act(background.resume))
    follow(box, update, said)
    return box


def tell_apart(run: state.Run, other: state.Run | None) -> str:
    """What a run is called in a chart beside another."""
    same = other is not None and run.folder.name == other.folder.name
    return f"{run.folder.parent.name}/{run.folder.name}" if same else run.folder.name


def write_wrong(text: str) -> str:
    return f"{STYLE}<div class='sftlab-run'><p role='alert' class='sftlab-wrong'>{pages.text(text)}</p></div>"


def follow(box, update, said) -> None:
    """Call `update` now and each second, in a thread, until the run has ended or the box is closed; errors are said there.

    A thread, because a kernel answers nothing else while a cell runs. A box has one at most, which no cell's end ends.
    """

    def try_update() -> bool:
        try:
            update()
        except Exception as error:  # whatever it is, a thread would lose it
            said.value = write_wrong(f"The panel has stopped: {error!r}. The run goes on; make the panel anew.")
            return False
        return box.run.status in state.ACTIVE

    def go_on() -> None:
        while box.comm is not None and box.follower is threading.current_thread() and try_update():
            time.sleep(EVERY)

    if try_update():
        box.follower = threading.Thread(target=go_on, name=f"panel of {box.run.folder.name}", daemon=True)
        box.follower.start()  # one before it sees that it isn't the one any more, and ends


def close(box) -> None:
    """Close a box and all in it; what follows a run for it ends."""
    for child in getattr(box, "children", ()):
        close(child)
    box.close()


def has_reader() -> bool:
    """Whether someone sits before this notebook. A front-end says with each cell whether it could ask its user something
    (`allow_stdin` of Jupyter's messages); papermill, nbval and other programs that run notebooks say no."""
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython import get_ipython

    shell = get_ipython()
    if not isinstance(shell, ZMQInteractiveShell):
        return False
    return bool(shell.kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
