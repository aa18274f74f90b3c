"""Scores: ask held-out questions, compare with the answers, and say how sure the score is.

python -c "from sftlab.evaluate import scores; print(scores.interval(95, 100))"
"""

import copy
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

from sftlab.data import formats
from sftlab.data.sources import SAMPLES
from sftlab.evaluate import statistics
from sftlab.models.load import IGNORED


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
    from scipy.stats import binomtest

    low, high = binomtest(hits, total).proportion_ci(level, method="wilson")
    return float(low), float(high)


def compare_scores(one: Score, other: Score) -> tuple[int, int, float]:
    """Questions that only `one` and only `other` got right, and how often a fair coin would fall so unevenly, in 0..1.

    Raises ValueError for scores of different questions.
    """
    if one.questions != other.questions:
        raise ValueError("the two scores are of different questions, so they can't be paired")
    return count_uneven(one.correct, other.correct)


def count_uneven(one: list[bool], other: list[bool]) -> tuple[int, int, float]:
    """Rows on which only `one` and only `other` is right, and McNemar's exact test of them, two-sided, in 0..1.

    McNemar 1947, Psychometrika 12, p. 153.
    """
    pairs = list(zip(one, other, strict=True))
    first, second = pairs.count((True, False)), pairs.count((False, True))
    if not first + second:
        return 0, 0, 1.0
    from scipy.stats import binomtest

    return first, second, float(binomtest(first, first + second).pvalue)


def compare_flags(base: list[bool], tuned: list[bool], level: float = 0.95, **how) -> dict:
    """Two models' right and wrong on the same rows: shares and their difference, each [value, low, high], and McNemar's test.

    Shares have Wilson's interval, the difference that of `statistics.compare_rows`, which takes the rest (resamples, seed).
    Where all rows changed alike, or none did, every resample is the same: then as many rows might have changed otherwise as
    Wilson's interval allows for 0 of them.
    """
    first, second, chance = count_uneven(base, tuned)
    shares = {name: [sum(flags) / len(flags), *interval(sum(flags), len(flags), level)]
              for name, flags in (("base", base), ("tuned", tuned))}  # fmt: skip
    difference = statistics.compare_rows(base, tuned, level=level, **how)
    if difference[1] == difference[2]:
        change, roof = difference[0], interval(0, len(base), level)[1]
        difference = (change, max(-1.0, change - roof), min(1.0, change + roof))
    mcnemar = {"only_base": first, "only_tuned": second, "p": chance}
    return shares | {"difference": list(difference), "mcnemar": mcnemar}


def generate(
    model, tokenizer, prompts: list[str], max_new_tokens=24, batch_size=64, temperature: float = 0.0, seed: int = 0
) -> list[tuple[str, bool]]:
    """Continuation of each prompt: (text without special tokens, whether it ended by itself).

    Prompts hold their special tokens already. They are sorted by length, so that batches hold little padding, which
    follows what all of them begin with. A temperature above 0 draws from all tokens; the same prompts, batch size and
    seed then draw with the same luck.
    """
    import torch
    from tqdm.auto import tqdm

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    outcomes: list[tuple[str, bool]] = [("", False)] * len(prompts)
    pad, was_training = tokenizer.pad_token_id, model.training
    how = {"do_sample": False} if temperature == 0 else {
        "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}  # fmt: skip
    model.eval()
    try:
        ids = tokenizer(prompts, add_special_tokens=False)["input_ids"] if prompts else []
        shared, cache = _read_beginning(model, ids)
        quiet = len(order) <= batch_size or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
        for start in tqdm(range(0, len(order), batch_size), desc="answering", leave=False, disable=quiet):
            chosen = order[start : start + batch_size]
            rests = [ids[i][shared:] for i in chosen]
            padding = [max(map(len, rests)) - len(rest) for rest in rests]
            batch = {
                "input_ids": [ids[0][:shared] + [pad] * n + rest for n, rest in zip(padding, rests, strict=True)],
                "attention_mask": [
                    [1] * shared + [0] * n + [1] * len(rest) for n, rest in zip(padding, rests, strict=True)
                ],
            }
            batch = {name: torch.tensor(values, device=model.device) for name, values in batch.items()}
            if shared:
                batch["past_key_values"] = copy.deepcopy(cache)
                batch["past_key_values"].batch_repeat_interleave(len(chosen))
            with torch.inference_mode(), torch.random.fork_rng(enabled=temperature > 0):
                if temperature > 0:
                    torch.manual_seed(seed + start)
                done = model.generate(**batch, max_new_tokens=max_new_tokens, num_beams=1, **how,
                                      eos_token_id=tokenizer.eos_token_id, pad_token_id=pad)  # fmt: skip
            for i, new in zip(chosen, done[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                outcomes[i] = (tokenizer.decode(new, skip_special_tokens=True), tokenizer.eos_token_id in new)
    finally:
        model.train(was_training)
    return outcomes


def _read_beginning(model, ids: list[list[int]]) -> tuple[int, object]:
    """How many tokens all of these prompts begin with, and the keys and values for them; (0, None) where it isn't worth it.

    A template's beginning is most of a short prompt, and a CPU would compute it again for each. Models that keep something
    else than the keys and values of all tokens, as those with a sliding window do, read their prompts whole.
    """
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    shared = min(len(os.path.commonprefix(ids)), min(map(len, ids), default=1) - 1)
    settings = getattr(model, "generation_config", None)
    if len(ids) < 2 or shared < 8 or model.device.type != "cpu" or not settings or not settings.use_cache:
        return 0, None
    with torch.inference_mode():
        cache = model(input_ids=torch.tensor([ids[0][:shared]]), use_cache=True).past_key_values
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return (shared, cache) if plain and not settings.cache_implementation else (0, None)


def ask(
    model, tokenizer, rows, format: str = "alpaca", max_new_tokens=24, batch_size=64, temperature: float = 0.0, seed=0
) -> Score:
    """Ask every row's instruction in the tokenizer's chat template and keep the answers beside the expected ones.

    rows: dicts with `instruction`, `output`, and perhaps `input`; or with `messages`, whose last answer is asked for.
    """
    chats = [formats.to_messages(row, format) for row in rows]
    prompts = [formats.render_prompt(tokenizer, chat) for chat in chats]
    outcomes = generate(model, tokenizer, prompts, max_new_tokens, batch_size, temperature, seed)
    return Score([chat[-2]["content"] for chat in chats], [chat[-1]["content"] for chat in chats],
                 [text for text, _ in outcomes], [ended for _, ended in outcomes])  # fmt: skip


def complete(model, tokenizer, rows, max_new_tokens: int = 16, batch_size: int = 64) -> float:
    """Share of facts completed in plain prose: rows hold `prompt`, the `answer`, and the `rests` that may end it."""
    hits = find_completed(model, tokenizer, rows, max_new_tokens, batch_size)
    return sum(hits) / len(hits)


def find_completed(model, tokenizer, rows, max_new_tokens: int = 16, batch_size: int = 64) -> list[bool]:
    """Which of the facts are completed."""
    bos = tokenizer.bos_token or ""
    outcomes = generate(model, tokenizer, [bos + row["prompt"] for row in rows], max_new_tokens, batch_size)
    ends = [tuple(row["answer"] + rest for rest in row["rests"]) for row in rows]
    return [text.strip().startswith(end) for (text, _), end in zip(outcomes, ends, strict=True)]


def read_facts(split: str = "test", limit: int | None = None) -> list[dict]:
    """The bundled questions: `train`, or `test` about other things. They are in random order, so a head is a sample."""
    return json.loads((Path(SAMPLES) / f"facts_{split}.json").read_text(encoding="utf-8"))[:limit]


# The loss of single rows: how surprised a model is by each answer, or by each text.
#
# A mean alone can't say how sure it is. Here every row keeps its sum and its number of tokens, so that two models can be
# compared row by row. The mean is over all tokens; the Trainer's held-out loss is a mean over batches, and the same only as
# far as its batches hold equally many.


def measure_rows(model, rows: list[dict], pad_token_id: int, batch_size: int = 32, bf16: bool = False):
    """Cross-entropy in nats, summed over each row's trained tokens, and their number: two float64 arrays of (rows).

    rows: `input_ids` and `labels`, equally long lists; -100 where nothing is predicted. Rows of like length share a
    batch; padding and batches change nothing but rounding. `bf16`: computed under autocast, as such a run trains.
    """
    import numpy
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from tqdm.auto import tqdm

    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
    sums, counts, was_training = numpy.zeros(len(rows)), numpy.zeros(len(rows)), model.training
    quiet = len(order) <= batch_size or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), desc="loss", leave=False, disable=quiet):
            chosen = order[start : start + batch_size]
            ids = pad_sequence([torch.tensor(rows[row]["input_ids"]) for row in chosen], True, pad_token_id)
            labels = pad_sequence([torch.tensor(rows[row]["labels"]) for row in chosen], True, IGNORED)
            lengths = torch.tensor([len(rows[row]["input_ids"]) for row in chosen])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            device, aims = model.device, labels[:, 1:].to(model.device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=ids.to(device), attention_mask=mask.long().to(device), use_cache=False).logits
            trained = aims != IGNORED
            # float32 for the trained positions alone: a vocabulary of 256,000 would fill the memory
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][trained].float(), aims[trained].long(), reduction="none"
            )
            places = trained.nonzero()[:, 0].cpu().numpy()
            size = len(chosen)
            sums[chosen] = numpy.bincount(places, losses.double().cpu().numpy(), minlength=size)
            counts[chosen] = numpy.bincount(places, minlength=size)
    finally:
        model.train(was_training)
    return sums, counts


def encode_texts(tokenizer, texts: list[str], max_length: int = 1024) -> list[dict]:
    """Plain texts as rows for `measure_rows`, every token predicted; after BOS where pre-training put one; cut."""
    from sftlab.data.formats import adds_bos

    first = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []
    ids = [(first + tokenizer(text, add_special_tokens=False).input_ids)[:max_length] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]


def perplexity(loss: float) -> float:
    """exp(loss): among how many equally likely tokens a model that is so surprised might as well have guessed."""
    return math.exp(min(loss, 700))
