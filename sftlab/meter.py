"""The stop-watch of a benchmark: a callback that times a training's steps and keeps what each batch held.

python -c "from sftlab import meter; help(meter.Meter)"
"""

import contextlib
import statistics
import threading
import time
from datetime import UTC, datetime

import psutil
import torch
from transformers import TrainerCallback

from sftlab import distributed, metrics
from sftlab.masking import IGNORED
from sftlab.options import UserError

KEPT = (
    "labels",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "lengths",
    "shared_prefix",
)  # what tells of a batch how long its samples are
EVERY = 0.2  # seconds between looks at a GPU's use


def count_batch(inputs: dict) -> tuple[list[int], int, int]:
    """(tokens of each sample without padding, trained tokens, positions with padding) of a batch as the model gets it.

    A beginning that samples share counts for each of them, as in a batch that doesn't hold it once.
    """
    labels = inputs["labels"]
    if "lengths" in inputs:
        lengths = inputs["lengths"].tolist()
        again = inputs["shared_prefix"] * (len(lengths) - 1)
        return lengths, int((labels != IGNORED).sum()), labels.numel() + again
    if "cu_seq_lens_q" in inputs:
        lengths = inputs["cu_seq_lens_q"].diff().tolist()
    elif "attention_mask" in inputs:
        lengths = inputs["attention_mask"].sum(-1).tolist()
    elif "position_ids" in inputs:  # which begin anew with each sample
        starts = (inputs["position_ids"].flatten() == 0).nonzero().flatten().tolist()
        lengths = [end - start for start, end in zip(starts, [*starts[1:], labels.numel()], strict=True)]
    else:
        lengths = [labels.shape[-1]] * labels.shape[0]
    return lengths, int((labels != IGNORED).sum()), labels.numel()


def keep_whole_steps(trainer, global_batch: int) -> None:
    """Leave out the rows at the end that fill no step, so that all steps are alike, and what is no training.

    Raises UserError for a set that doesn't fill one.
    """
    rows = len(trainer.train_dataset)
    if rows < global_batch:
        kind = "packed rows" if trainer.args.packing else "rows that teach something"
        raise UserError(f"sizes: {rows} {kind} don't fill a step of {global_batch}; take larger sizes or a smaller --batch-size.")  # fmt: skip
    trainer.train_dataset = trainer.train_dataset.select(range(rows - rows % global_batch))
    if trainer.lengths is not None:
        trainer.lengths = trainer.lengths[: len(trainer.train_dataset)]
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"


class Meter(TrainerCallback):
    """Times `steps` steps after the `untimed` ones; `read` tells what this process saw.

    seconds: take as many steps as fill them, by the last untimed one. On a GPU steps are timed by events, so that the host
    runs ahead as it always does; it waits for the device at both ends of the timed window only.
    """

    def __init__(self, trainer, untimed: int, steps: int, seconds: float | None = None):
        self.untimed, self.steps, self.seconds = untimed, steps, seconds
        self.gpu = torch.cuda.is_available()
        self.batches, self.losses, self.marks, self.uses = [], [[]], [], []
        self.begun = self.ended = None
        self.last, self.done = time.perf_counter(), threading.Event()
        self.train_batch = trainer.training_step
        trainer.training_step = self.training_step
        trainer.add_callback(self)

    def training_step(self, model, inputs, *rest):
        """The trainer's own, and what the batch held is kept, to be looked at after the end."""
        loss = self.train_batch(model, inputs, *rest)
        self.batches.append((len(self.losses) - 1, {name: inputs[name] for name in KEPT if name in inputs}))
        self.losses[-1].append(loss)
        return loss

    def mark(self):
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def look(self) -> dict:
        """The clocks at an end of the window: the wall's, this process's, the machine's."""
        if self.gpu:
            torch.cuda.synchronize()
        return {"clock": time.perf_counter(), "used": sum(psutil.Process().cpu_times()[:2]),
                "busy": metrics.count_machine_seconds()[0]}  # fmt: skip

    def on_step_end(self, args, state, control, **kwargs):
        step = state.global_step
        self.losses.append([])
        if step > self.untimed:
            self.marks.append(self.mark())
        if step == self.untimed:
            self.begin()
        if step == self.untimed + self.steps:
            self.ended = self.look()
            self.done.set()
            control.should_training_stop = True
        self.last = time.perf_counter()

    def begin(self) -> None:
        took = time.perf_counter() - self.last
        if self.seconds:
            self.steps = distributed.from_main(lambda: max(2, round(self.seconds / took)))
        if self.gpu:
            threading.Thread(target=self.watch, daemon=True).start()
        distributed.gather(None)  # all begin together
        self.started, self.begun = datetime.now(UTC), self.look()
        self.marks.append(self.mark())

    def watch(self) -> None:
        with contextlib.suppress(ImportError, RuntimeError):  # without NVML the use stays unknown
            import pynvml

            with contextlib.suppress(pynvml.NVMLError):
                while not self.done.wait(EVERY):
                    self.uses.append(torch.cuda.utilization() / 100)

    def read(self) -> dict:
        """What this process saw in the timed steps, in plain numbers."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        end = self.untimed + self.steps
        counts = [count_batch(batch) for step, batch in self.batches if self.untimed <= step < end]
        window, used, busy = (self.ended[name] - self.begun[name] for name in ("clock", "used", "busy"))
        return {
            "window": window, "used": used, "busy": busy, "gpu_use": statistics.median(self.uses) if self.uses else None,
            "seconds": [a.elapsed_time(b) / 1000 if self.gpu else b - a for a, b in pairs],
            "lengths": [length for lengths, _, _ in counts for length in lengths],
            "trained": sum(trained for _, trained, _ in counts), "positions": sum(size for _, _, size in counts),
            "losses": [float(sum(part)) for part in self.losses if part],
        }  # fmt: skip
