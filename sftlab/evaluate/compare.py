"""Is it better, how sure are we, what did it forget: a run's tuned model against its base, on the rows held out.

Both models answer the same prompts and score the same answers, so that all is compared row by row. The outcome goes into
the run's result.json, under `evaluation`, and into report.html beside it.

sftlab evaluate runs/first
"""

import dataclasses
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from sftlab import files
from sftlab.config.configs import EvaluateConfig
from sftlab.data import cleaning
from sftlab.data.rows import get_prompt
from sftlab.errors import UserError
from sftlab.evaluate import forgetting, report, scores, statistics, verdict
from sftlab.memory import dry_run
from sftlab.models.load import IGNORED
from sftlab.train.saved import Run, load_models, read_run

ROOM = 1.5  # answers may be so many times as long as the longest expected one before they are cut off
LONGEST = 512  # tokens
ANSWER = ("question", "expected", "base", "tuned", "base_right", "tuned_right")


@dataclass
class Measured:
    """What one model did: answers, summed losses and their tokens by row, the prose probe."""

    score: scores.Score
    sums: object
    counts: object
    prose: dict


def evaluate_run(config: EvaluateConfig) -> dict:
    """Measure a run's base and tuned model, write result.json and report.html, and return what is under `evaluation`.

    Losses are in nats per trained token, shares in 0..1; every difference is tuned - base, as [value, low, high]. Raises
    UserError for a folder that is no finished run, and for what is missing.
    """
    started = time.time()
    run = read_run(config.run_dir, config.dataset_path, config.trust_remote_code)
    rows, max_new_tokens = choose_rows(run, config)
    config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    probe = forgetting.choose_probe(run.config.model_name, config.prose, config.num_texts)
    measured = {}
    for name, model in load_models(run):
        print(f"{name}: {len(rows)} questions, {len(probe[1])} texts")
        measured[name] = measure_model(model, run, rows, probe, config)
        del model  # or the tuned one would be loaded beside it
    how = {"level": config.level, "resamples": config.resamples, "seed": config.seed}
    found = compare_models(run, rows, measured, config, how)
    prose = [one.prose for one in measured.values()]
    found["forgetting"] = forgetting.compare_probe(*probe[:2], *prose, **how)
    found["seconds"] = round(time.time() - started, 2)
    save_evaluation(run.folder, found)
    return found


def choose_rows(run: Run, config: EvaluateConfig) -> tuple[list[dict], int]:
    """The held-out rows that are asked, cut to the run's max_length, or a sample of them; and how long an answer may be.

    A row must have a last answer left, and the model must have positions for an answer to its prompt.
    """
    split, limit = run.splits["test"], run.config.max_length
    settings = dry_run.read_settings(run.config.model_name, run.config.trust_remote_code).get_text_config()
    positions = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    labels = split["labels"]
    starts = [find_last_answer(row) for row in labels]
    answered = [number for number, start in enumerate(starts) if start < limit]
    if not answered:
        path = run.config.dataset_path
        raise UserError(f"dataset_path: within {limit} tokens no held-out row of {path} has an answer.")
    longest = max(len(labels[number]) - starts[number] for number in answered)
    room = config.max_new_tokens or min(LONGEST, round(ROOM * longest))
    kept = [number for number in answered if starts[number] + room <= positions]
    if not kept:
        raise UserError(f"max_new_tokens: no question leaves room for {room} tokens of answer; lower it.")
    if len(kept) < len(answered):
        left_out = f"{len(answered) - len(kept)} questions are left out"
        print(f"{left_out}: with {room} tokens for the answer they exceed the model's {positions}")
    if config.num_questions and len(kept) > config.num_questions:
        kept = sorted(random.Random(config.seed).sample(kept, config.num_questions))
    rows = [split[number] | {"row": number} for number in kept]
    return [row | {name: row[name][:limit] for name in ("input_ids", "labels")} for row in rows], room


def find_last_answer(labels: list[int]) -> int:
    """Where the last answer begins: the last trained token with none before it; the row's length if there is none."""
    trained = [label != IGNORED for label in labels]
    starts = [at for at, (before, here) in enumerate(zip([False, *trained], trained, strict=False)) if here > before]
    return starts[-1] if starts else len(labels)


def measure_model(model, run: Run, rows: list[dict], probe: tuple, config: EvaluateConfig) -> Measured:
    """Ask one model everything."""
    size, bf16 = config.batch_size, run.config.bf16
    options = (config.max_new_tokens, size, config.temperature, config.seed)
    score = scores.ask(model, run.tokenizer, rows, run.data["format"], *options)
    sums, counts = scores.measure_rows(model, rows, run.tokenizer.pad_token_id, size, bf16)
    prose = forgetting.measure_probe(model, run.tokenizer, *probe[1:], size, bf16, run.config.max_length)
    return Measured(score, sums, counts, prose)


def compare_models(run: Run, rows: list[dict], measured: dict, config: EvaluateConfig, how: dict) -> dict:
    """All numbers of base against tuned on the held-out rows, and the verdict, which leaves leaked questions out.

    how: level, resamples and seed of the intervals.
    """
    base, tuned = (one.score for one in measured.values())
    train = [{"messages": chat} for chat in run.splits["train"]["messages"]]
    leaks = cleaning.find_leaks(train, rows, run.data["options"]["near_threshold"])
    languages = cleaning.group_languages(base.questions)
    whole = compare_part(measured, list(range(len(rows))), how)
    clean = compare_part(measured, [number for number in range(len(rows)) if number not in leaks], how)
    answers = (base.questions, base.expected, base.answers, tuned.answers, base.correct, tuned.correct)
    measure = verdict.choose_measure(base.expected)
    decided = verdict.judge(measure, clean["exact_match"], clean["held_out_loss"], clean["questions"], config)
    return {
        **decided,
        **whole,
        "held_out_rows": len(run.splits["test"]),
        "perplexity": {name: scores.perplexity(whole["held_out_loss"][name]) for name in measured},
        "ended": {name: sum(one.score.ended) / len(rows) for name, one in measured.items()},
        "languages": {name: compare_part(measured, part, how) for name, part in languages.items()},
        "leakage": {
            "rows": len(leaks),
            "without": clean,
            "found": [
                {
                    "row": rows[number]["row"],
                    "question": base.questions[number],
                    "why": leak["why"],
                    "similar": leak["similar"],
                    "training_row": leak["train"],
                    "training_prompt": get_prompt(train[leak["train"]]),
                }
                for number, leak in leaks.items()
            ],
        },
        "answers": [dict(zip(ANSWER, row, strict=True)) for row in zip(*answers, strict=True)],
        "config": dataclasses.asdict(config),
    }


def compare_part(measured: dict[str, Measured], rows: list[int], how: dict) -> dict:
    """Exact match and the loss per trained token on some of the rows; None where there is nothing to compare."""
    flags = [list(map(one.score.correct.__getitem__, rows)) for one in measured.values()]
    counts = measured["base"].counts[rows]
    sums = [one.sums[rows] for one in measured.values()]
    return {
        "questions": len(rows),
        "exact_match": statistics.compare_flags(*flags, **how) if rows else None,
        "held_out_loss": statistics.compare_means(*sums, counts, **how) if counts.any() else None,
    }


def save_evaluation(folder: Path, found: dict) -> None:
    """Put an evaluation into a run's result.json, which keeps all else, and write the page; an earlier one is replaced."""
    result = files.read_json(folder / "result.json")
    if "evaluation" in result:
        print(f"{folder}: the earlier evaluation is replaced")
    files.write_json(folder / "result.json", result | {"evaluation": found})
    report.write_report(folder)
