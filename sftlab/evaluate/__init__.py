"""Base against tuned: scores, statistics, forgetting, the verdict, the report (notebook 11)."""

from sftlab.evaluate.scores import (
    Score,
    ask,
    compare_scores,
    complete,
    generate,
    measure_rows,
    perplexity,
    read_facts,
)
from sftlab.evaluate.statistics import compare_flags, compare_rows, count_uneven, interval, smallest_share

__all__ = [
    "Score",
    "ask",
    "compare_flags",
    "compare_rows",
    "compare_scores",
    "complete",
    "count_uneven",
    "generate",
    "interval",
    "measure_rows",
    "perplexity",
    "read_facts",
    "smallest_share",
]
