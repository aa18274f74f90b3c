"""Ask held-out questions, compare the answers with the expected ones, and measure the loss of single rows.

python -c "from sftlab.evaluate import scores; print(scores.read_facts('test', 2))"
"""

import json
import os
from dataclasses import dataclass

import numpy
import torch
from tqdm.auto import tqdm

from sftlab.data import formats, templates
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
        return statistics.interval(sum(self.correct), len(self.correct))

    def select(self, keep: list[bool]) -> "Score":
        """The score on some of the rows only, such as the Japanese ones."""
        lists = (self.questions, self.expected, self.answers, self.ended)
        return Score(*([item for item, wanted in zip(items, keep, strict=True) if wanted] for items in lists))

    def __str__(self) -> str:
        low, high = self.interval
        sure = f"95 % interval {low:.1%} to {high:.1%}, {len(self.answers)} questions"
        return f"exact match {self.exact_match:.1%} ({sure})"


def ask(model, tokenizer, rows, format: str = "alpaca", max_new_tokens=24, batch_size=64) -> Score:
    """Ask every row's instruction in the tokenizer's chat template and keep the answers beside the expected ones.

    rows: dicts with `instruction`, `output`, and perhaps `input`; or with `messages`, whose last answer is asked for.
    """
    asked = [(formats.to_messages(row, format), row.get("tools")) for row in rows]
    prompts = [formats.render_prompt(tokenizer, chat, tools) for chat, tools in asked]
    outcomes = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    expected = [templates.write_answer(tokenizer, chat, tools) for chat, tools in asked]
    questions = [chat[-2]["content"] for chat, _ in asked]
    return Score(questions, expected, [text for text, _ in outcomes], [ended for _, ended in outcomes])


def generate(model, tokenizer, prompts: list[str], max_new_tokens=24, batch_size=64) -> list[tuple[str, bool]]:
    """Likeliest continuation of each prompt, which holds its special tokens already: (its answer, whether it ended by itself).

    The model is left in eval mode.
    """
    ends = list(templates.find_traits(tokenizer).ends)
    options = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False}
    form = {"add_special_tokens": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
    outcomes = [("", False)] * len(prompts)
    model.eval()
    with torch.inference_mode():
        for chosen in iterate_batches("answering", [len(prompt) for prompt in prompts], batch_size):
            batch = tokenizer([prompts[row] for row in chosen], return_token_type_ids=False, **form).to(model.device)
            done = model.generate(**batch, **options, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
            for row, new in zip(chosen, done[:, batch.input_ids.shape[1] :].tolist(), strict=True):
                outcomes[row] = templates.parse_answer(tokenizer, new)[1:]
    return outcomes


def iterate_batches(title: str, lengths: list[int], size: int):
    """Row numbers of batches of rows of like length, which hold little padding; with a bar."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    quiet = len(order) <= size or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    for start in tqdm(range(0, len(order), size), desc=title, leave=False, disable=quiet):
        yield order[start : start + size]


def complete(model, tokenizer, rows, batch_size: int = 64) -> list[bool]:
    """Which facts are completed in plain prose: rows hold `prompt`, the `answer`, and the `rests` that may end it."""
    bos = tokenizer.bos_token or ""
    outcomes = generate(model, tokenizer, [bos + row["prompt"] for row in rows], 16, batch_size)
    ends = [tuple(row["answer"] + rest for rest in row["rests"]) for row in rows]
    return [text.strip().startswith(end) for (text, _), end in zip(outcomes, ends, strict=True)]


def read_facts(split: str = "test", limit: int | None = None) -> list[dict]:
    """The bundled questions: `train`, or `test` about other things. They are in random order, so a head is a sample."""
    return json.loads((SAMPLES / f"facts_{split}.json").read_text(encoding="utf-8"))[:limit]


def measure_rows(model, rows: list[dict], pad_token_id: int, batch_size: int = 32, bf16: bool = False):
    """Cross-entropy in nats, summed over each row's trained tokens, and their number: two float64 arrays of (rows).

    rows: `input_ids` and `labels`, equally long lists; -100 where nothing is predicted. Every row keeps its own sum, so
    that two models can be compared row by row; padding and batches change nothing but rounding. `bf16`: computed under
    autocast, as such a run trains.
    """
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate, device = DataCollatorForLanguageModeling(pad_token_id), model.device
    sums, counts = numpy.zeros(len(rows)), numpy.zeros(len(rows))
    model.eval()
    with torch.inference_mode():
        for chosen in iterate_batches("loss", [len(row["input_ids"]) for row in rows], batch_size):
            batch = {name: tensor.to(device) for name, tensor in collate([rows[row] for row in chosen]).items()}
            labels = batch.pop("labels")
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                logits = model(**batch, use_cache=False).logits
            trained = labels[:, 1:] != IGNORED
            # float32 for the trained positions alone: a vocabulary of 256,000 would fill the memory
            predicted, right = logits[:, :-1][trained].float(), labels[:, 1:][trained]
            losses = torch.nn.functional.cross_entropy(predicted, right, reduction="none").double().cpu()
            counts[chosen] = lengths = trained.sum(1).tolist()
            sums[chosen] = [row.sum() for row in losses.split(lengths)]
    return sums, counts


def encode_texts(tokenizer, texts: list[str], max_length: int = 1024) -> list[dict]:
    """Plain texts as rows for `measure_rows`, every token predicted; after BOS where pre-training put one; cut."""
    first = [tokenizer.bos_token_id] if formats.adds_bos(tokenizer) else []
    ids = [(first + tokenizer(text, add_special_tokens=False).input_ids)[:max_length] for text in texts]
    return [{"input_ids": row, "labels": row} for row in ids]
