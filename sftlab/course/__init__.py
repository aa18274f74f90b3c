"""The notebooks' set-up, headless runs, sweeps, the form (notebooks 00 and 08)."""

from sftlab.course.headless import run_notebooks
from sftlab.course.notebook import record, show_table, start

__all__ = ["record", "run_notebooks", "show_table", "start"]
