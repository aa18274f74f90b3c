"""The other side of `form_answers`: its process started when something is asked, its answers handed on, outdated ones dropped.

python -c "from sftlab.course import form_worker; help(form_worker.ask)"
"""

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import typing

from sftlab.config.configs import TrainConfig

_working: list["Worker"] = []  # the one whose process was started last


@dataclasses.dataclass
class Worker:
    """tell: called in a thread with (figures, whether they are all); process: that of `form_answers`, while there is one."""

    tell: typing.Callable[[list[dict], bool], None]
    process: subprocess.Popen | None = None
    asked: int = 0
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)


def ask(worker: Worker, config: TrainConfig) -> None:
    """Ask for the figures of a configuration; those of an earlier one are never told after this."""
    with worker.lock:
        worker.asked += 1
        line = json.dumps({"asked": worker.asked, "config": dataclasses.asdict(config)}) + "\n"
        for _ in range(2):  # it may just have ended, since it wasn't asked for a while
            if worker.process is None or worker.process.poll() is not None:
                start(worker)
            try:
                worker.process.stdin.write(line)
                return worker.process.stdin.flush()
            except (BrokenPipeError, ValueError):  # it has ended; ValueError: it was told to
                worker.process = None


def drop(worker: Worker) -> None:
    """Tell nothing of what was asked; it no longer holds."""
    with worker.lock:
        worker.asked += 1


def start(worker: Worker) -> None:
    """Start its process, and end that of another form, whose cell was run again, as a rule: each holds half a GB."""
    for other in _working:
        close(other)
    _working[:] = [worker]
    # of a session of its own: interrupting the kernel shall not end it
    worker.process = subprocess.Popen(
        [sys.executable, "-m", "sftlab.course.form_answers"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    threading.Thread(target=follow, args=(worker, worker.process), daemon=True).start()


def follow(worker: Worker, process: subprocess.Popen) -> None:
    """Hand its answers on until it ends, and see it off, so that no zombie is left."""
    done = 0
    for line in process.stdout:
        answer = json.loads(line)
        with worker.lock:
            if answer["asked"] == worker.asked:
                worker.tell(answer["figures"], answer["done"])
            done = answer["asked"] if answer["done"] else done
    code = process.wait()
    with worker.lock:
        if code and worker.process is process and done != worker.asked:
            note = f"the process that works them out ended with {code}, perhaps for want of memory"
            worker.tell([{"name": "figures", "value": "not known", "note": note, "bad": True}], True)


def close(worker: Worker) -> None:
    """End the process, after what it's at; the next question starts another."""
    if worker.process is not None:
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
