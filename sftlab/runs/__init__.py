"""Runs from outside: started on one or many machines, in the background, listed, followed (notebooks 08 and 09)."""

from sftlab.runs.background import resume, start, stop, wait
from sftlab.runs.panel import attach
from sftlab.runs.state import ACTIVE, find, read

__all__ = ["ACTIVE", "attach", "find", "read", "resume", "start", "stop", "wait"]
