"""What watches a run while it trains: a stop from outside, losses that are no numbers, the best checkpoint, the live log.

python -c "from sftlab.train import callbacks; help(callbacks.Divergence)"
"""

import math
import signal
import threading
import time
from collections import deque
from pathlib import Path

from transformers import EarlyStoppingCallback, TrainerCallback

from sftlab import files
from sftlab.errors import UserError
from sftlab.train import distributed, folder
from sftlab.train.checkpoints import find_last, read_meters

BETWEEN = 0.5  # seconds at least from one progress.json to the next
PATIENCE = 10  # batches in a row that are worse than guessing


class StopOnSignal(TrainerCallback):
    """SIGINT (Ctrl-C, the stop button of a notebook), SIGTERM and SIGHUP (the terminal is gone) end the run after the step,
    with a checkpoint; in several processes all at the same step, whichever got the signal.

    A second SIGINT ends it at once. `received`: the signal, or None. Signals reach only the main thread.
    """

    def __init__(self):
        self.received, self.before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not where nohup has had it ignored
                numbers.append(signal.SIGHUP)
            self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # a launcher passes on what came here already
        self.received = signal.Signals(number)
        print(
            f"\n{self.received.name}: what is being done is finished and saved first; Ctrl-C again stops at once",
            flush=True,
        )

    def on_step_end(self, args, state, control, **kwargs):
        number = distributed.find_highest(int(self.received or 0))  # what one process received, all heed
        if number:
            self.received = signal.Signals(number)
            control.should_save = control.should_training_stop = True
            if args.save_total_limit == 1:  # the Trainer would keep the best checkpoint only, and delete this one
                args.save_total_limit = 2

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received is not None and not float(state.epoch).is_integer():  # the Trainer takes a break for the end
            control.should_evaluate = control.should_save = control.should_log = False


class Divergence(TrainerCallback):
    """Ends a run whose loss is no number any more, or worse than guessing for some steps in a row.

    The gradients' norm is looked at before they move the weights, so that no checkpoint holds what they would have done.
    `vocabulary`: its size; who guesses blindly has a loss of log(vocabulary).
    """

    def __init__(self, vocabulary: int):
        self.guessing = math.log(vocabulary)
        self.losses = deque(maxlen=PATIENCE)

    def check_loss(self, loss: float, args, state, model) -> None:
        """Called with the loss of each batch. Raises UserError with a diagnosis."""
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.global_step + 1}: {self.diagnose(args, state, model)}")
        self.losses.append(loss)
        if len(self.losses) == PATIENCE and min(self.losses) > 1.5 * self.guessing:
            raise UserError(f"the loss was above {1.5 * self.guessing:.1f} for {PATIENCE} batches, up to step {state.global_step + 1}; "
                            f"guessing blindly has {self.guessing:.1f}. {self.advise(args)}")  # fmt: skip

    def check_gradient(self, norm, args, state, model, applied: bool = False) -> None:
        """Called with the norm of a step's gradients. applied: whether the step is made already, as DeepSpeed does. Raises UserError."""
        if norm is None or math.isfinite(norm):
            return
        said = (
            "was no number at step {}, and DeepSpeed has applied it"
            if applied
            else "is no number at step {}, and was not applied"
        )
        why = self.advise(args) if applied else self.diagnose(args, state, model)
        raise UserError(f"a gradient {said.format(state.global_step + 1)}: {why}")

    def diagnose(self, args, state, model) -> str:
        """Why, as far as can be seen: weights that were broken to begin with, or a training that broke them."""
        broken = [
            name
            for name, weight in model.named_parameters()
            if weight.is_floating_point() and not getattr(weight, "ds_tensor", weight).isfinite().all()
        ]
        if broken and state.global_step == 0:
            return f"the base model's weights hold such values before the first step ({broken[0]}). Load it again."
        if not broken and state.global_step == 0 and not args.bf16:
            return "at the first step, from sound weights. Look at the data's report, and at the model's own precision."
        return ("the weights themselves are broken. " if broken else "") + self.advise(args)

    def advise(self, args) -> str:
        last = find_last(args.output_dir)
        kept = f"The last checkpoint, {last}, is from before. " if last else ""
        return f"{kept}Lower --learning-rate (now {args.learning_rate:g}) or add --warmup-steps 0.03."


class SaveBest(TrainerCallback):
    """A checkpoint whenever the held-out loss is the lowest so far; the Trainer keeps the best one from deletion."""

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        loss = (metrics or {}).get("eval_loss")
        if loss is not None and (state.best_metric is None or loss < state.best_metric):
            control.should_save = True


class GoOn(TrainerCallback):
    """Puts back, at the start of a resumed run, what the Trainer had added up when its checkpoint was written.

    `patience`: of early stopping, as this run asks for it; the checkpoint brings its own along.
    """

    def __init__(self, trainer, checkpoint, patience: int):
        self.trainer, self.checkpoint, self.patience = trainer, checkpoint, patience

    def on_train_begin(self, args, state, control, **kwargs):
        read_meters(self.checkpoint, self.trainer)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience = self.patience


class LiveLog(TrainerCallback):
    """Writes the log and the progress of a run into its folder as they come (`folder`), in the first process alone.

    A file that can't be written is told once, and ends no run. To be added after GoOn, which sets the count of tokens.
    """

    def __init__(self, trainer):
        self.trainer, self.folder = trainer, Path(trainer.args.output_dir)
        self.progress = files.read_json(self.folder / folder.PROGRESS)
        self.written, self.broken = 0.0, False

    def write(self, function, *arguments) -> None:
        try:
            function(*arguments)
        except OSError as error:
            if not self.broken:
                print(f"{error.filename}: {error.strerror}; the run goes on, and its live log is not whole", flush=True)
            self.broken = True

    def note(self, state, doing: str, soon: bool = True) -> None:
        """Write progress.json; `soon`: a little later does, too."""
        now = time.time()
        if not state.is_world_process_zero or soon and now - self.written < BETWEEN:
            return
        self.written, tokens = now, int(self.trainer._total_train_tokens)
        at = {"time": now, "step": state.global_step, "tokens": tokens}
        if doing == "training" and state.global_step > self.first_step:
            self.progress.setdefault("began", at)  # the first step is slow, and doesn't count for the speed
        self.progress |= (
            at | {"doing": doing, "max_steps": state.max_steps, "epoch": state.epoch} | folder.measure_memory()
        )
        self.write(files.write_json, self.folder / folder.PROGRESS, self.progress)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        if state.is_world_process_zero:
            self.write(folder.keep, self.folder, state.log_history)
            self.note(state, "training", soon=False)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            beside = {"time": time.time(), "max_steps": state.max_steps} | folder.measure_memory()
            self.write(folder.append, self.folder, state.log_history[-1] | beside)

    def on_step_end(self, args, state, control, **kwargs):
        self.note(state, "training", soon=state.global_step > self.first_step + 1)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.note(state, "evaluating")

    def on_train_end(self, args, state, control, **kwargs):
        self.note(state, "ending", soon=False)


# What one process holds of a training: weights, gradients, the optimizer's state, in bytes, at the first step.
#
# These are the three things that ZeRO shards, so that one can see who holds what.


class Held(TrainerCallback):
    """Counts when the optimizer has just moved the weights for the first time: all three are there.

    `parts`: bytes of {"weights", "gradients", "optimizer"}, or None before that step. With DeepSpeed the optimizer's part
    has the float32 copy of the weights that it moves, and of the gradients each process has only its share left by then,
    from stage 1 on.
    """

    def __init__(self):
        self.parts, self.hook = None, None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = optimizer
        while (deeper := getattr(inner, "optimizer", None)) is not None:  # accelerate's and DeepSpeed's wrappers
            inner = deeper

        seen = set()  # DeepSpeed moves one group of weights after the other, and gives each one's gradients free

        def count(*_):
            found = count_parts(model, inner, seen)
            self.parts = {name: found[name] + (self.parts or {}).get(name, 0) for name in found}

        self.hook = inner.register_step_post_hook(count)

    def on_step_end(self, args, state, control, **kwargs):
        self.hook.remove()


def count_parts(model, optimizer, seen: set) -> dict:
    """Bytes by part that aren't in `seen` yet. A tensor that several names share counts once; under ZeRO-3 a weight is the
    piece that is here.
    """
    weights = list(model.parameters())
    pieces = [piece for weight in weights if (piece := getattr(weight, "ds_tensor", None)) is not None]
    moved = [weight for group in optimizer.param_groups for weight in group["params"]]
    gradients = [weight.grad for weight in weights + moved if weight.grad is not None]
    states = [
        value for state in optimizer.state.values() for value in state.values() if hasattr(value, "untyped_storage")
    ]
    return {
        "weights": count_bytes(weights + pieces, seen),
        "gradients": count_bytes(gradients, seen),
        "optimizer": count_bytes(moved + states, seen),
    }


def count_bytes(tensors: list, seen: set) -> int:
    """Bytes of the storages behind tensors, each once; `seen`: those that were counted before, and these from now on."""
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total
