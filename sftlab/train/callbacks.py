"""What follows a run while it trains: a stop from outside, evaluations, the live log, what ZeRO shards."""

import contextlib
import signal
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from sftlab import machine
from sftlab.train import distributed
from sftlab.train import folder as run_folder

BETWEEN = 0.5  # seconds at least from one progress.json to the next


class StopOnSignal(TrainerCallback):
    """Ends a run with a checkpoint after the step in which SIGINT, SIGTERM or SIGHUP (the terminal is gone) reaches a process.

    A second SIGINT ends it at once. `received`: the signal, or None.
    """

    def __init__(self):
        self.received, self.before = None, {}

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not where nohup has had it ignored
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number, frame):
        if self.received is None:
            self.received = signal.Signals(number)
            words = "what is being done is finished and saved first; Ctrl-C again stops at once"
            print(f"\n{self.received.name}: {words}", flush=True)
        elif number == signal.SIGINT:  # a launcher passes on the others, which came here already
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        number = max(distributed.gather(int(self.received or 0)))  # all stop for what one process received
        if number:
            self.received = signal.Signals(number)
            control.should_save = control.should_training_stop = True
            if args.save_total_limit == 1:  # the Trainer would keep the best checkpoint only, and delete this one
                args.save_total_limit = 2


class EvaluateEpochs(TrainerCallback):
    """Takes the validation loss at the end of each epoch and of the run, within the last step: its checkpoint comes after it.

    A run that ends with its best checkpoint gets one where the loss is the lowest so far. (The Trainer's own evaluation of an
    epoch comes after the checkpoint, which would be written again where it is the best.)
    """

    def on_step_end(self, args, state, control, **kwargs):
        if args.eval_strategy == "epoch" and (state.epoch.is_integer() or state.global_step >= state.max_steps):
            control.should_evaluate = True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_evaluate = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if args.load_best_model_at_end and (state.best_metric is None or metrics["eval_loss"] < state.best_metric):
            control.should_save = True


class LiveLog(TrainerCallback):
    """Writes log.jsonl and progress.json as a run goes, on rank 0; what can't be written is left out."""

    def __init__(self, trainer):
        self.trainer, self.folder = trainer, Path(trainer.args.output_dir)
        self.written, self.began = 0.0, {}

    def note(self, state, doing: str, soon: bool = True) -> None:
        """Write progress.json; `soon`: a little later does, too."""
        now = time.time()
        if soon and now - self.written < BETWEEN:
            return
        self.written, tokens = now, int(self.trainer._total_train_tokens)
        at = {"time": now, "step": state.global_step, "tokens": tokens}
        if doing == "training" and state.global_step > self.first_step:
            self.began = self.began or {"began": at}  # the first step is slow, and doesn't count for the speed
        more = {"doing": doing, "max_steps": state.max_steps, "epoch": state.epoch, "memory_bytes": machine.read_held()}
        with contextlib.suppress(OSError):
            run_folder.update_progress(self.folder, at | self.began | more)

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        run_folder.cut_log(self.folder, state.global_step)
        self.note(state, "training", soon=False)

    def on_log(self, args, state, control, **kwargs):
        more = {"time": time.time(), "max_steps": state.max_steps, "memory_bytes": machine.read_held()}
        with contextlib.suppress(OSError):
            run_folder.append_entry(self.folder, state.log_history[-1] | more)

    def on_step_end(self, args, state, control, **kwargs):
        self.note(state, "training", soon=state.global_step > self.first_step + 1)

    def on_prediction_step(self, args, state, control, **kwargs):
        self.note(state, "evaluating")

    def on_train_end(self, args, state, control, **kwargs):
        self.note(state, "ending", soon=False)


class CountState(TrainerCallback):
    """Counts, when the optimizer first steps, the bytes that this process holds of the three things that ZeRO shards.

    `parts`: bytes of {"weights", "gradients", "optimizer"}, or None. With DeepSpeed the optimizer's part has the float32 copy of the
    weights, and of the gradients each process has only its shard left by then, from stage 1 on.
    """

    parts = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner, seen = optimizer, set()
        while (deeper := getattr(inner, "optimizer", None)) is not None:  # accelerate's and DeepSpeed's wrappers
            inner = deeper
        self.parts = {"weights": 0, "gradients": 0, "optimizer": 0}

        def count(*_):  # DeepSpeed steps group by group, and frees the gradients of each
            for part, tensor in list_state(model, inner):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in seen:
                    seen.add(storage.data_ptr())
                    self.parts[part] += storage.nbytes()

        self.hook = inner.register_step_post_hook(count)

    def on_step_end(self, args, state, control, **kwargs):
        self.hook.remove()


def list_state(model, optimizer):
    """Yield (part, tensor); the optimizer's weights last, which may be the model's or its own float32 copy."""
    weights = list(model.parameters())
    stepped = [weight for group in optimizer.param_groups for weight in group["params"]]
    shards = [weight.ds_tensor for weight in weights if getattr(weight, "ds_tensor", None) is not None]  # of ZeRO-3
    yield from (("weights", weight) for weight in weights + shards)
    yield from (("gradients", weight.grad) for weight in weights + stepped if weight.grad is not None)
    states = (value for state in optimizer.state.values() for value in state.values())
    yield from (("optimizer", tensor) for tensor in (*stepped, *states) if torch.is_tensor(tensor))
