"""One sentence on whether a tuned model is better than its base, by rules that are written down.

The rules, in order:
1. Where the usual held-out answer is one short line, exact match decides; where it's longer, the loss on the answers
   does, because a good answer can be worded in many ways.
2. Questions that the training rows give away don't count.
3. Better, or worse: the paired bootstrap interval of the difference excludes zero and, for exact match, McNemar's exact
   test agrees. (With few questions, or scores near 0 or 100 %, the bootstrap alone is too sure.)
4. Too few questions to say: the difference is not clear, and so many questions could not have shown the gain that
   matters (`--smallest-gain`); for the loss, so few rows that no test of signs could.
5. Else no measurable gain. What these questions could have shown is said with it.
"""

import math
from statistics import median

from sftlab.config.configs import EvaluateConfig
from sftlab.evaluate import statistics

SHORT_ANSWER = 64  # bytes: about ten English words, or twenty Japanese letters
BETTER, WORSE, NONE, TOO_FEW = "better", "worse", "no measurable gain", "too few questions"


def choose_measure(answers: list[str]) -> str:
    """exact_match if the median of the expected answers is one short line, else loss."""
    sizes = [len(answer.encode()) if "\n" not in answer.strip() else SHORT_ANSWER + 1 for answer in answers]
    return "exact_match" if median(sizes) <= SHORT_ANSWER else "loss"


def judge(measure: str, exact: dict | None, loss: dict | None, rows: int, config: EvaluateConfig) -> dict:
    """The verdict from `statistics.compare_flags` and `compare_means` over the rows that count; both None without any.

    `outcome` is better, worse, no measurable gain or too few questions; `verdict` says it with its numbers;
    `smallest_difference`: what so many rows find in four of five cases, in the measure that decided (`judged_by`).
    """
    if rows == 0 or exact is None or loss is None:
        outcome, words, smallest = TOO_FEW, "the training rows give away every held-out one.", None
    elif measure == "exact_match":
        outcome, words, smallest = judge_exact(exact, loss, rows, config)
    else:
        outcome, words, smallest = judge_loss(loss, rows, config)
    beginning = "Too few questions to say" if outcome == TOO_FEW else outcome.capitalize()
    words = f"{beginning}: {words}"
    return {"verdict": words, "outcome": outcome, "judged_by": measure, "smallest_difference": smallest}


def judge_exact(exact: dict, loss: dict, rows: int, config: EvaluateConfig) -> tuple[str, str, float]:
    (change, low, high), mcnemar = exact["difference"], exact["mcnemar"]
    uneven = (mcnemar["only_base"] + mcnemar["only_tuned"]) / rows
    smallest = statistics.smallest_share(rows, uneven, config.level)
    points = [f"{100 * value:+.1f}" if abs(value) >= 0.0005 else "0.0" for value in (change, low, high)]
    words = (
        f"the tuned model answers {exact['tuned'][0]:.1%} of {rows} held-out questions exactly right, the base "
        f"{exact['base'][0]:.1%}: {points[0]} points ({config.level:.0%} interval {points[1]} to {points[2]})."
    )
    if mcnemar["p"] < 1 - config.level and (low > 0 or high < 0):
        return BETTER if low > 0 else WORSE, words, smallest
    shift, floor, roof = loss["difference"]
    if floor > 0 or roof < 0:
        words += f" The loss on the answers did change, by {shift:+.3f} nats per token."
    could = f"a difference of {100 * smallest:.1f} points"
    if smallest <= config.smallest_gain:
        return NONE, f"{words} In four of five cases {could} would have been found.", smallest
    needed = statistics.rows_needed(config.smallest_gain, uneven, config.level)
    not_found = f"not one of {100 * config.smallest_gain:g}; that takes about {math.ceil(needed)}"
    return TOO_FEW, f"{words} With {rows} questions {could} can be found, {not_found}.", smallest


def judge_loss(loss: dict, rows: int, config: EvaluateConfig) -> tuple[str, str, float]:
    change, low, high = loss["difference"]
    smallest = statistics.smallest_mean(low, high, config.level)
    words = (
        f"the tuned model's loss is {loss['tuned']:.3f} nats per answer token on {rows} held-out rows, the base's "
        f"{loss['base']:.3f}: {change:+.3f} ({config.level:.0%} interval {low:+.3f} to {high:+.3f})."
    )
    if 2 * 0.5**rows > 1 - config.level:  # the test of signs, every row pointing the same way
        return TOO_FEW, f"{words} Even {rows} rows that all agreed would prove nothing.", smallest
    if low > 0 or high < 0:
        return BETTER if high < 0 else WORSE, words, smallest
    return NONE, f"{words} In four of five cases a difference of {smallest:.3f} would have been found.", smallest
