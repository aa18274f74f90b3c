"""Base against tuned: scores, statistics, forgetting, the verdict, the report (notebook 11)."""

from sftlab.evaluate.scores import Score, ask, complete, generate, read_facts
from sftlab.evaluate.statistics import compare_flags, compare_rows, count_uneven, interval

__all__ = [
    "Score",
    "ask",
    "compare_flags",
    "compare_rows",
    "complete",
    "count_uneven",
    "generate",
    "interval",
    "read_facts",
]
