"""One run: its steps, trainer, callbacks, checkpoints, folder, processes, and what was saved (notebook 04).

The names are loaded at their first use, so that a run folder is read (`sftlab runs`, `sftlab doctor`) without torch.
"""

import importlib

MODULES = {
    "find_port": "distributed",
    "load_any": "saved",
    "load_models": "saved",
    "load_run": "saved",
    "make_trainer": "run",
    "open_run": "saved",
    "read_run": "saved",
    "train": "run",
}
__all__ = list(MODULES)


def __getattr__(name: str):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
