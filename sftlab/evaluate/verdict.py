"""One sentence on whether a tuned model is better than its base, by rules that are written down.

The rules, in order:
1. Where the usual held-out answer is one short line, exact match decides; where it's longer, the loss on the answers
   does, because a good answer can be worded in many ways. `--judge-by` says otherwise.
2. Questions that the training rows give away don't count.
3. Better, or worse: the paired bootstrap interval of the difference excludes zero and, for exact match, McNemar's exact
   test agrees. (With few questions, or scores near 0 or 100 %, the bootstrap alone is too sure.)
4. Too few questions to say: the difference is not clear, and so many questions could not have shown the gain that
   matters (`--smallest-gain`); for the loss, so few rows that no test of signs could.
5. Else no measurable gain. What these questions could have shown is said with it.

python -c "from sftlab.evaluate import verdict; print(verdict.__doc__)"
"""

from dataclasses import dataclass
from statistics import median

from sftlab.config.configs import EvaluateConfig
from sftlab.evaluate import statistics

SHORT_ANSWER = 64  # bytes: about ten English words, or twenty Japanese letters
BETTER, WORSE, NONE, TOO_FEW = "better", "worse", "no measurable gain", "too few questions"


@dataclass
class Verdict:
    """`outcome` is better, worse, no measurable gain or too few questions; `sentence` says it with its numbers.

    `smallest`: the smallest difference that so many rows find in four of five cases, in the measure that decided; None without rows.
    """

    outcome: str
    sentence: str
    judged_by: str
    smallest: float | None


def choose_measure(answers: list[str], judge_by: str) -> str:
    """exact_match or loss: as asked for, else exact match if the median of the expected answers is one short line."""
    if judge_by != "auto":
        return judge_by
    sizes = [len(answer.encode()) if "\n" not in answer.strip() else SHORT_ANSWER + 1 for answer in answers]
    return "exact_match" if median(sizes) <= SHORT_ANSWER else "loss"


def judge(measure: str, exact: dict | None, loss: dict | None, rows: int, config: EvaluateConfig) -> Verdict:
    """The verdict from `scores.compare_flags` and from the held-out loss, over the rows that count.

    loss: `base`, `tuned`, `difference`. exact and loss are None where no row counts.
    """
    if rows == 0 or exact is None or loss is None:
        words = "Too few questions to say: the training rows give away every held-out one."
        return Verdict(TOO_FEW, words, measure, None)
    return (judge_exact if measure == "exact_match" else judge_loss)(exact, loss, rows, config)


def judge_exact(exact: dict, loss: dict, rows: int, config: EvaluateConfig) -> Verdict:
    change, low, high = exact["difference"]
    mcnemar = exact["mcnemar"]
    uneven = (mcnemar["only_base"] + mcnemar["only_tuned"]) / rows
    smallest = statistics.smallest_share(rows, uneven, config.level)
    sizes = f"{exact['tuned'][0]:.1%} of {rows} held-out questions exactly right, the base {exact['base'][0]:.1%}"
    sizes += f": {points(change)} points ({config.level:.0%} interval {points(low)} to {points(high)})"
    if mcnemar["p"] < 1 - config.level and (low > 0 or high < 0):
        outcome = BETTER if low > 0 else WORSE
        return Verdict(outcome, f"{outcome.capitalize()}: the tuned model answers {sizes}.", "exact_match", smallest)
    could, (shift, floor, roof) = f"{100 * smallest:.1f} points", loss["difference"]
    also = f" The loss on the answers did change, by {shift:+.3f} nats per token." if floor > 0 or roof < 0 else ""
    if smallest > config.smallest_gain:
        needed = statistics.rows_needed(config.smallest_gain, uneven, config.level)
        words = (f"Too few questions to say: the tuned model answers {sizes}. With {rows} questions a difference of {could} "
                 f"can be found, not one of {100 * config.smallest_gain:g}; that takes about {needed}.")  # fmt: skip
        return Verdict(TOO_FEW, words + also, "exact_match", smallest)
    words = f"No measurable gain: the tuned model answers {sizes}. A difference of {could} would have been found in four of five cases."
    return Verdict(NONE, words + also, "exact_match", smallest)


def judge_loss(exact: dict, loss: dict, rows: int, config: EvaluateConfig) -> Verdict:
    change, low, high = loss["difference"]
    smallest = statistics.smallest_mean(low, high, config.level)
    sizes = f"{loss['tuned']:.3f} nats per answer token on {rows} held-out rows, the base's {loss['base']:.3f}"
    sizes += f": {change:+.3f} ({config.level:.0%} interval {low:+.3f} to {high:+.3f})"
    if rows < statistics.fewest_rows(config.level):
        words = f"Too few questions to say: the tuned model's loss is {sizes}. Even {rows} rows that all agreed would prove nothing."
        return Verdict(TOO_FEW, words, "loss", smallest)
    if low > 0 or high < 0:
        outcome = BETTER if high < 0 else WORSE
        return Verdict(outcome, f"{outcome.capitalize()}: the tuned model's loss is {sizes}.", "loss", smallest)
    words = f"No measurable gain: the tuned model's loss is {sizes}. A difference of {smallest:.3f} would have been found in four of five cases."
    return Verdict(NONE, words, "loss", smallest)


def points(share: float) -> str:
    """A difference of shares in points, with its sign."""
    return f"{100 * share:+.1f}" if abs(share) >= 0.0005 else "0.0"
