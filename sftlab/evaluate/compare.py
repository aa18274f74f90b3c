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
from sftlab.train.saved import Subject, load_models, read_run

ROOM = 1.5  # answers may be so many times as long as the longest expected one before they are cut off
LONGEST = 512  # tokens


@dataclass
class Measured:
    """What one model did: answers, summed losses and their tokens by row, the prose probe."""

    score: scores.Score
    sums: object
    counts: object
    prose: dict


def choose_rows(run: Subject, config: EvaluateConfig) -> list[dict]:
    """The held-out rows that are asked, cut to the run's max_length: those with a last answer left, or a sample of them."""
    split, limit = run.splits["test"], run.config.max_length
    labels = split["labels"]
    kept = [number for number in range(len(split)) if find_last_answer(labels[number]) < limit]
    if config.num_questions and len(kept) > config.num_questions:
        kept = sorted(random.Random(config.seed).sample(kept, config.num_questions))
    if not kept:
        raise UserError(
            f"dataset_path: within {limit} tokens no held-out row of {run.config.dataset_path} has an answer."
        )
    rows = [split[number] | {"row": number} for number in kept]
    return [row | {name: row[name][:limit] for name in ("input_ids", "labels")} for row in rows]


def find_last_answer(labels: list[int]) -> int:
    """Where the last answer begins: the last trained token with none before it; the row's length if there is none."""
    starts = (
        at for at in range(len(labels) - 1, -1, -1) if labels[at] != IGNORED and (at == 0 or labels[at - 1] == IGNORED)
    )
    return next(starts, len(labels))


def find_room(run: Subject, rows: list[dict]) -> int:
    """How many tokens an answer may have: half as many again as the longest expected one, 512 at most."""
    longest = max(len(run.tokenizer(row["messages"][-1]["content"]).input_ids) for row in rows)
    return min(LONGEST, round(ROOM * longest) + 1)


def leave_out_long(run: Subject, rows: list[dict], max_new_tokens: int) -> list[dict]:
    """The rows whose prompt leaves room for an answer among the positions that the model has; the others are told."""
    settings = dry_run.read_settings(run.config.model_name, run.config.trust_remote_code).get_text_config()
    most = getattr(settings, "max_position_embeddings", None) or sys.maxsize
    fits = [find_last_answer(row["labels"]) + max_new_tokens <= most for row in rows]
    if not all(fits):
        print(
            f"{fits.count(False)} questions are left out: with {max_new_tokens} tokens for the answer they exceed the model's {most}"
        )
    if not any(fits):
        raise UserError(f"max_new_tokens: no question leaves room for {max_new_tokens} tokens of answer; lower it.")
    return [row for row, kept in zip(rows, fits, strict=True) if kept]


def evaluate_run(config: EvaluateConfig) -> dict:
    """Measure a run's base and tuned model, write result.json and report.html, and return what is under `evaluation`.

    Losses are in nats per trained token, shares in 0..1; every difference is tuned - base, as [value, low, high]. Raises
    UserError for a folder that is no finished run, and for what is missing.
    """
    started = time.time()
    run = read_run(config.run_dir, config.dataset_path, config.trust_remote_code)
    rows = choose_rows(run, config)
    config = dataclasses.replace(config, max_new_tokens=config.max_new_tokens or find_room(run, rows))
    rows = leave_out_long(run, rows, config.max_new_tokens)
    probe = forgetting.choose_probe(run.config.model_name, config.prose, config.num_texts)
    leaks = cleaning.find_leaks([{"messages": chat} for chat in run.splits["train"]["messages"]], rows,
                               run.report["options"]["near_threshold"])  # fmt: skip
    measured = {}
    for name, model in load_models(run):
        print(f"{name}: {len(rows)} questions, {len(probe[1])} texts")
        measured[name] = measure(model, run, rows, probe, config)
        del model  # or the tuned one would be loaded beside it
    found = compare(run, rows, leaks, measured, config)
    found["forgetting"] = forgetting.compare(*probe[:2], measured["base"].prose, measured["tuned"].prose, **how(config))
    found["seconds"] = round(time.time() - started, 2)
    save(run.folder, found)
    return found


def measure(model, run: Subject, rows: list[dict], probe: tuple, config: EvaluateConfig) -> Measured:
    """Ask one model everything."""
    score = scores.ask(model, run.tokenizer, rows, run.report["format"], config.max_new_tokens, config.batch_size,
                         config.temperature, config.seed)  # fmt: skip
    sums, counts = scores.measure_rows(model, rows, run.tokenizer.pad_token_id, config.batch_size, run.config.bf16)
    text = forgetting.measure(
        model, run.tokenizer, *probe[1:], config.batch_size, run.config.bf16, run.config.max_length
    )
    return Measured(score, sums, counts, text)


def how(config: EvaluateConfig) -> dict:
    return {"level": config.level, "resamples": config.resamples, "seed": config.seed}


def compare(run: Subject, rows: list[dict], leaks: dict, measured: dict[str, Measured], config: EvaluateConfig) -> dict:
    """All numbers of base against tuned on the held-out rows, and the verdict."""
    base, tuned = measured["base"], measured["tuned"]
    languages = [cleaning.find_language(question) for question in base.score.questions]
    every = list(range(len(rows)))
    clean = [number for number in every if number not in leaks]
    exact, loss = pair_exact(measured, every, config), pair_loss(measured, every, config)
    parts = {"exact_match": pair_exact(measured, clean, config), "held_out_loss": pair_loss(measured, clean, config)}
    decided = verdict.judge(
        verdict.choose_measure(base.score.expected, config.judge_by), *parts.values(), len(clean), config
    )
    by_language = {name: [n for n in every if languages[n] == name] for name in sorted(set(languages))}
    train_rows = [{"messages": chat} for chat in run.splits["train"]["messages"]]
    return {
        "verdict": decided.sentence, "outcome": decided.outcome, "judged_by": decided.judged_by,
        "smallest_difference": decided.smallest, "questions": len(rows), "held_out_rows": len(run.splits["test"]),
        "exact_match": exact, "held_out_loss": loss,
        "perplexity": {name: scores.perplexity(loss[name]) for name in measured},
        "ended": {name: sum(one.score.ended) / len(rows) for name, one in measured.items()},
        "languages": {name: {"questions": len(part), "exact_match": pair_exact(measured, part, config),
                             "held_out_loss": pair_loss(measured, part, config)} for name, part in by_language.items()},
        "leakage": {
            "rows": len(leaks), "answers_seen": cleaning.count_seen_answers(train_rows, rows), "without": parts,
            "found": [{"row": rows[n]["row"], "question": base.score.questions[n], "why": leak["why"], "similar": leak["similar"],
                       "training_row": leak["train"], "training_prompt": get_prompt(train_rows[leak["train"]])}
                      for n, leak in leaks.items()],
        },
        "answers": [dict(zip(("question", "expected", "base", "tuned", "base_right", "tuned_right"), row, strict=True)) for row in
                    zip(base.score.questions, base.score.expected, base.score.answers, tuned.score.answers,
                        base.score.correct, tuned.score.correct, strict=True)],
        "config": dataclasses.asdict(config),
    }  # fmt: skip


def pair_exact(measured: dict[str, Measured], rows: list[int], config: EvaluateConfig) -> dict | None:
    """Exact match on some of the rows, or None if there are none."""
    flags = ([one.score.correct[n] for n in rows] for one in measured.values())
    return scores.compare_flags(*flags, **how(config)) if rows else None


def pair_loss(measured: dict[str, Measured], rows: list[int], config: EvaluateConfig) -> dict | None:
    """The loss per trained token on some of the rows: base, tuned, and their difference with its interval."""
    counts = measured["base"].counts[rows]
    if not counts.sum():
        return None
    sums = [one.sums[rows] for one in measured.values()]
    return {
        "base": float(sums[0].sum() / counts.sum()), "tuned": float(sums[1].sum() / counts.sum()),
        "difference": list(statistics.compare_rows(*sums, counts, **how(config))), "tokens": int(counts.sum()),
    }  # fmt: skip


def save(folder: Path, found: dict) -> None:
    """Put an evaluation into a run's result.json, which keeps all else, and write the page; an earlier one is replaced."""
    result = files.read_json(folder / "result.json")
    if "evaluation" in result:
        print(f"{folder}: the earlier evaluation is replaced")
    files.write_json(folder / "result.json", result | {"evaluation": found})
    report.write(folder)
