"""Is it better, how sure are we, what did it forget: a run's tuned model against its base, on the rows held out.

Both models answer the same prompts and score the same answers, so that all is compared row by row. The outcome goes into
the run's result.json, under `evaluation`, and into report.html beside it.

sftlab evaluate runs/first
"""

import dataclasses
import math
import random
import time

import pandas

from sftlab import files
from sftlab.config.configs import EvaluateConfig
from sftlab.data import cleaning
from sftlab.data.rows import get_prompt
from sftlab.errors import UserError
from sftlab.evaluate import forgetting, report, scores, statistics, verdict
from sftlab.models.load import IGNORED, find_positions
from sftlab.train.saved import Run, load_models, read_run, read_settings

ROOM = 1.5  # answers may be so many times as long as the longest expected one before they are cut off
LONGEST = 512  # tokens


def evaluate_run(config: EvaluateConfig) -> dict:
    """Measure a run's base and tuned model, write result.json and report.html, and return what is under `evaluation`.

    Losses are in nats per trained token, shares in 0..1; every difference is tuned - base, as [value, low, high]. Raises
    UserError for a folder that is no finished run, and for what is missing.
    """
    started = time.time()
    run = read_run(config.run_dir, config.dataset_path, config.trust_remote_code)
    rows, max_new_tokens = choose_rows(run, config)
    config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    probe, texts, facts = forgetting.choose_probe(run.config.model_name, config.prose, config.num_texts)
    measured, prose = {}, []
    size, bf16 = config.batch_size, run.config.bf16
    for name, model in load_models(run):
        print(f"{name}: {len(rows)} questions, {len(texts)} texts")
        measured[name] = measure_model(model, run, rows, config)
        prose.append(forgetting.measure_probe(model, run.tokenizer, texts, facts, size, bf16, run.config.max_length))
        del model  # or the tuned one would be loaded beside it
    how = {"level": config.level, "resamples": config.resamples, "seed": config.seed}
    found = compare_models(run, rows, *measured.values(), config, how)
    found["forgetting"] = forgetting.compare_probe(probe, texts, *prose, **how)
    found["seconds"] = round(time.time() - started, 2)
    files.write_json(run.folder / "result.json", files.read_json(run.folder / "result.json") | {"evaluation": found})
    report.write_report(run.folder)
    return found


def choose_rows(run: Run, config: EvaluateConfig) -> tuple[list[dict], int]:
    """The held-out rows with an answer within max_length and the model's positions, or a sample; how long answers may be."""
    split, limit = run.splits["test"], run.config.max_length
    positions = find_positions(read_settings(run))
    labels = split["labels"]
    starts = [find_last_answer(row) for row in labels]
    answered = [number for number, start in enumerate(starts) if start < limit]
    if answered and split[answered[0]]["messages"][-1]["role"] == "text":
        raise UserError("dataset_path: its rows are plain text, without a question to ask. Go by the validation loss.")
    if not answered:
        why = f"within {limit} tokens no held-out row of {run.config.dataset_path} has an answer"
        raise UserError(f"dataset_path: {why}.")
    longest = max(len(labels[number]) - starts[number] for number in answered)
    room = config.max_new_tokens or min(LONGEST, round(ROOM * longest))
    kept = [number for number in answered if starts[number] + room <= positions]
    if not kept:
        raise UserError(f"max_new_tokens: no question leaves room for {room} tokens of answer; lower it.")
    if left_out := len(answered) - len(kept):
        why = f"with {room} tokens for the answer they exceed the model's {positions}"
        print(f"{left_out} questions are left out: {why}")
    if config.num_questions and len(kept) > config.num_questions:
        kept = sorted(random.Random(config.seed).sample(kept, config.num_questions))
    rows = [split[number] | {"row": number} for number in kept]
    return [row | {name: row[name][:limit] for name in ("input_ids", "labels")} for row in rows], room


def find_last_answer(labels: list[int]) -> int:
    """Where the last answer begins: the last trained token with none before it; the row's length if there is none."""
    trained = [label != IGNORED for label in labels]
    starts = [at for at, (before, here) in enumerate(zip([False, *trained], trained, strict=False)) if here > before]
    return starts[-1] if starts else len(labels)


def measure_model(model, run: Run, rows: list[dict], config: EvaluateConfig) -> pandas.DataFrame:
    """What one model makes of each row: its answer, whether that is right and ended by itself, the summed loss, its tokens."""
    score = scores.ask(model, run.tokenizer, rows, run.data["format"], config.max_new_tokens, config.batch_size)
    sums, counts = scores.measure_rows(model, rows, run.tokenizer.pad_token_id, config.batch_size, run.config.bf16)
    return pandas.DataFrame(vars(score) | {"right": score.correct, "loss": sums, "tokens": counts})


def compare_models(run: Run, rows: list[dict], base, tuned, config: EvaluateConfig, how: dict) -> dict:
    """All numbers of base against tuned (of `measure_model`) on the held-out rows; leaked questions don't count for the verdict."""
    train = [{"messages": chat} for chat in run.splits["train"]["messages"]]
    leaks = cleaning.find_leaks(train, rows, run.data["options"]["near_threshold"])
    whole = compare_part(base, tuned, how)
    clean = compare_part(base.drop(list(leaks)), tuned.drop(list(leaks)), how)
    measure = verdict.choose_measure(base["expected"])
    both = {"base": base, "tuned": tuned}
    answers = pandas.DataFrame({"question": base["questions"], "expected": base["expected"]})
    for name, one in both.items():
        answers[name], answers[f"{name}_right"] = one["answers"], one["right"]
    return {
        **verdict.judge(measure, clean["exact_match"], clean["held_out_loss"], clean["questions"], config),
        **whole,
        "perplexity": {name: math.exp(min(whole["held_out_loss"][name], 700)) for name in both},
        "held_out_rows": len(run.splits["test"]),
        "ended": {name: one["ended"].mean() for name, one in both.items()},
        "leakage": {
            "rows": len(leaks),
            "without": clean,
            "found": [
                leak | {"row": row["row"], "question": question, "training_prompt": get_prompt(train[leak["train"]])}
                for row, question, leak in ((rows[at], base["questions"][at], leak) for at, leak in leaks.items())
            ],
        },
        "answers": answers.to_dict("records"),
        "config": dataclasses.asdict(config),
    }


def compare_part(base: pandas.DataFrame, tuned: pandas.DataFrame, how: dict) -> dict:
    """Exact match and the loss per trained token on some of the rows; None where there is nothing to compare."""
    flags, tokens = (base["right"].tolist(), tuned["right"].tolist()), base["tokens"]
    return {
        "questions": len(base),
        "exact_match": statistics.compare_flags(*flags, **how) if flags[0] else None,
        "held_out_loss": statistics.compare_means(base["loss"], tuned["loss"], tokens, **how) if tokens.any() else None,
    }
