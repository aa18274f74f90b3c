"""One run: its steps, trainer, callbacks, checkpoints, folder, processes, and what was saved (notebook 04)."""

from sftlab.train.distributed import find_port
from sftlab.train.run import make_trainer, train
from sftlab.train.saved import load_any, load_models, load_run, open_run, read_run

__all__ = ["find_port", "load_any", "load_models", "load_run", "make_trainer", "open_run", "read_run", "train"]
