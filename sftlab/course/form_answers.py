"""The process that works out a form's figures: configurations come in, answers go out, and only the last question counts.

A step on tensors without bytes changes torch while it lasts, and the notebook may be loading a model meanwhile: so it's done in
a process apart. That ends when it isn't asked for a while, or when who asks is gone. `form_worker` starts it.

    (echo '{"asked": 1, "config": {"use_lora": true}}'; sleep 60) | python -m sftlab.course.form_answers
"""

import itertools
import json
import os
import queue
import signal
import sys
import threading
import typing

from sftlab.config.configs import TrainConfig
from sftlab.course.widgets import find_figures

IDLE = 120  # seconds without a question until the process ends: it holds the libraries, about half a GB


class Outdated(Exception):
    """Another question came, or who asks is gone: what is being worked out is of no use any more."""


def main() -> None:
    """Answer questions from standard input, JSON in a line, {asked, config}: {asked, figures, done} as each figure comes."""
    from sftlab.models import load

    lines: queue.Queue = queue.Queue()
    busy = False

    def read() -> None:
        for line in itertools.chain(sys.stdin, [None]):
            lines.put(line)
            os.kill(os.getpid(), signal.SIGINT)  # advice on a large model may take a minute

    def stop(*_) -> None:
        if busy:
            raise Outdated

    signal.signal(signal.SIGINT, stop)
    threading.Thread(target=read, daemon=True).start()
    load.quiet_libraries()
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that a library prints shall come between
    while True:
        try:
            line = lines.get(timeout=IDLE)
        except queue.Empty:
            break
        if line is None:
            break
        try:
            busy = lines.empty()
            if busy:
                answer(json.loads(line), answers)
        except Outdated:
            pass
        finally:
            busy = False


def answer(question: dict, answers: typing.TextIO) -> None:
    figures, done = [], False
    found = find_figures(TrainConfig.build(**question["config"]))
    while not done:
        following = next(found, None)
        done, figures = following is None, [*figures, *([following] if following else [])]
        print(json.dumps({"asked": question["asked"], "figures": figures, "done": done}), file=answers, flush=True)


if __name__ == "__main__":
    main()
