"""The notebooks' set-up and exercises, headless runs, sweeps, the form (notebooks 00 and 08)."""

from sftlab.course.exercises import check, compare, exercise, hint, predict, progress
from sftlab.course.headless import run_notebooks
from sftlab.course.notebook import quiet, record, show_table, start

__all__ = [
    "check",
    "compare",
    "exercise",
    "hint",
    "predict",
    "progress",
    "quiet",
    "record",
    "run_notebooks",
    "show_table",
    "start",
]
