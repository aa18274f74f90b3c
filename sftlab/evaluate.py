"""Scores: ask held-out questions, compare with the answers, and say how sure the score is.

python -c "from sftlab import evaluate; print(evaluate.interval(95, 100))"
"""

import json
import os
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import NormalDist

from sftlab import formats
from sftlab.sources import SAMPLES


@dataclass
class Score:
    """Answers to questions: one entry per row in each list. `ended` says whether the answer ended by itself (EOS)."""

    questions: list[str]
    expected: list[str]
    answers: list[str]
    ended: list[bool]

    @property
    def correct(self) -> list[bool]:
        return [answer.strip() == wanted.strip() for answer, wanted in zip(self.answers, self.expected, strict=True)]

    @property
    def exact_match(self) -> float:
        return sum(self.correct) / len(self.correct) if self.correct else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        return interval(sum(self.correct), len(self.correct))

    def select(self, keep: list[bool]) -> "Score":
        """The score on some of the rows only, such as the Japanese ones."""
        lists = (self.questions, self.expected, self.answers, self.ended)
        return Score(*([item for item, wanted in zip(items, keep, strict=True) if wanted] for items in lists))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"exact match {self.exact_match:.1%} (95 % interval {low:.1%} to {high:.1%}, {len(self.answers)} questions)"
        )


def interval(hits: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share, in 0..1 (Wilson 1927, JASA 22, p. 209); sound at 0 % and 100 % too."""
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = hits / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def compare(one: Score, other: Score) -> tuple[int, int, float]:
    """Questions that only `one` and only `other` got right, and how often a fair coin would fall so unevenly, in 0..1.

    McNemar's exact test, two-sided (McNemar 1947, Psychometrika 12, p. 153). Raises ValueError for scores of different
    questions.
    """
    if one.questions != other.questions:
        raise ValueError("the two scores are of different questions, so they can't be paired")
    pairs = list(zip(one.correct, other.correct, strict=True))
    first, second = pairs.count((True, False)), pairs.count((False, True))
    tail = sum(comb(first + second, k) for k in range(min(first, second) + 1))
    return first, second, min(1.0, 2 * tail / 2 ** (first + second))


def generate(
    model, tokenizer, prompts: list[str], max_new_tokens: int = 24, batch_size: int = 64
) -> list[tuple[str, bool]]:
    """Greedy continuation of each prompt: (text without special tokens, whether it ended by itself).

    Prompts hold their special tokens already. They are sorted by length, so that batches hold little padding.
    """
    import torch
    from tqdm.auto import tqdm

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outcomes: list[tuple[str, bool]] = [("", False)] * len(prompts)
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    try:
        quiet = len(order) <= batch_size or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
        for start in tqdm(range(0, len(order), batch_size), desc="answering", leave=False, disable=quiet):
            chosen = order[start : start + batch_size]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
            batch = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            with torch.inference_mode():
                ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                                     eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
            for i, new in zip(chosen, ids[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                outcomes[i] = (tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id in new)
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    return outcomes


def ask(model, tokenizer, rows, format: str = "alpaca", max_new_tokens: int = 24, batch_size: int = 64) -> Score:
    """Ask every row's instruction in the tokenizer's chat template and keep the answers beside the expected ones.

    rows: dicts with `instruction`, `output`, and perhaps `input`.
    """
    chats = [formats.to_messages(row, format) for row in rows]
    prompts = [formats.render_prompt(tokenizer, chat) for chat in chats]
    outcomes = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    return Score([chat[0]["content"] for chat in chats], [row["output"] for row in rows],
                 [text for text, _ in outcomes], [ended for _, ended in outcomes])  # fmt: skip


def complete(model, tokenizer, rows, max_new_tokens: int = 16, batch_size: int = 64) -> float:
    """Share of facts completed in plain prose: rows hold `prompt`, the `answer`, and the `rests` that may end it."""
    bos = tokenizer.bos_token or ""
    outcomes = generate(model, tokenizer, [bos + row["prompt"] for row in rows], max_new_tokens, batch_size)
    ends = [tuple(row["answer"] + rest for rest in row["rests"]) for row in rows]
    hits = [text.strip().startswith(end) for (text, _), end in zip(outcomes, ends, strict=True)]
    return sum(hits) / len(hits)


def read_facts(split: str = "test", limit: int | None = None) -> list[dict]:
    """The bundled questions: `train`, or `test` about other things. They are in random order, so a head is a sample."""
    return json.loads((Path(SAMPLES) / f"facts_{split}.json").read_text(encoding="utf-8"))[:limit]
