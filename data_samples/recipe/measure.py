"""Measure tiny-base: what it knows, what it can answer before and after SFT, by method and seed, with intervals.

python data_samples/recipe/measure.py                         # the whole table, about 15 minutes on 2 CPU cores
python data_samples/recipe/measure.py --methods lora          # these rows of the model card anew, the others as they were
python data_samples/recipe/measure.py --methods lora --seeds 1 --output one.json
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from statistics import fmean

import torch

from sftlab import files
from sftlab.config.configs import DataConfig, TrainConfig
from sftlab.data import dataset as data_set
from sftlab.data import formats, sources
from sftlab.evaluate import scores
from sftlab.models import load
from sftlab.train import run as train_run

LORA = {"use_lora": True, "learning_rate": 3e-3}
METHODS = {
    "full": {"learning_rate": 2e-4},
    "lora": LORA,
    "lora, chatml": LORA,
    "lora, llama2": LORA,
    "lora 8-bit": LORA | {"use_8bit": True},
    "lora 4-bit": LORA | {"use_4bit": True},
    "lora, shuffled answers": LORA,
}
MEASURED = load.TINY_BASE / "measured.json"


def shuffle_answers(rows: list[dict], seed: int) -> list[dict]:
    """The same questions with the answers of their relation and language dealt out anew."""
    rng, rows = random.Random(seed), [dict(row) for row in rows]
    for key in {(row["relation"], row["language"]) for row in rows}:
        chosen = [row for row in rows if (row["relation"], row["language"]) == key]
        answers = [row["output"] for row in chosen]
        rng.shuffle(answers)
        for row, answer in zip(chosen, answers, strict=True):
            row["output"] = answer
    return rows


def chance(rows: list[dict]) -> float:
    """What always giving the most frequent answer of the relation and language would score."""
    answers: dict[tuple, Counter] = {}
    for row in rows:
        answers.setdefault((row["relation"], row["language"]), Counter())[row["output"]] += 1
    return sum(counter.most_common(1)[0][1] for counter in answers.values()) / len(rows)


def describe(score: scores.Score, rows: list[dict]) -> dict:
    """Exact match with its interval for both languages, the share that ended, and exact match by relation."""
    languages = {lang: score.select([row["language"] == lang for row in rows]) for lang in ("en", "ja")}
    relations = sorted({row["relation"] for row in rows})
    return {
        **{lang: [part.exact_match, *part.interval] for lang, part in languages.items()},
        "ended": sum(score.ended) / len(score.ended),
        "relations": {name: score.select([row["relation"] == name for row in rows]).exact_match for name in relations},
    }


def share(values: list[float]) -> str:
    """A score in percent, with the interval if there is one."""
    return f"{values[0]:.1%} ({values[1]:.1%} to {values[2]:.1%})"


def render(table: dict) -> str:
    """The model card's tables in Markdown: the base, then each method over its seeds."""
    base = table["base"]
    lines = [
        "| base model | English | Japanese |", "|---|---|---|",
        f"| exact match in the alpaca format | {share(base['en'])} | {share(base['ja'])} |",
        f"| answer on the first line, whatever follows | {base['first_line']['en']:.1%} | {base['first_line']['ja']:.1%} |",
        f"| the same facts completed in prose | {base['prose']['en']:.1%} | {base['prose']['ja']:.1%} |", "",
        f"Always giving the most frequent answer of a relation would score {table['chance']:.1%}.", "",
        "| after SFT | seed | English | Japanese | ended by itself |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for run in table["runs"]:
        lines.append(
            f"| {run['method']} | {run['seed']} | {share(run['en'])} | {share(run['ja'])} | {run['ended']:.1%} |"
        )
    lines += [
        "",
        "| mean over seeds | English | Japanese | spread (highest less lowest, points) |",
        "|---|---|---|---|",
    ]
    for method in dict.fromkeys(run["method"] for run in table["runs"]):
        scores = {lang: [run[lang][0] for run in table["runs"] if run["method"] == method] for lang in ("en", "ja")}
        means = " | ".join(f"{sum(values) / len(values):.1%}" for values in scores.values())
        spreads = ", ".join(f"{100 * (max(values) - min(values)):.1f}" for values in scores.values())
        lines.append(f"| {method} | {means} | {spreads} |")
    seconds = [
        run["seconds"] for run in table["runs"] if run["method"].startswith("lora") and "bit" not in run["method"]
    ]
    if seconds:
        lines += [
            "",
            f"Training with LoRA took {min(seconds):.0f} to {max(seconds):.0f} seconds on {table['machine']}.",
        ]
    return "\n".join(lines).replace("%", " %")


def write_card(table: dict) -> None:
    """Put the tables into the model card, between its marks."""
    card = load.TINY_BASE / "README.md"
    head, mark, rest = card.read_text(encoding="utf-8").partition("<!-- measured -->")
    tail = rest.partition("<!-- end -->")[2]
    files.write_text(card, f"{head}{mark}\n{render(table)}\n<!-- end -->{tail}")


def tune(method: str, seed: int, epochs: float, folder: Path, test: list[dict]) -> dict:
    """One SFT run of a method and its score on the held-out questions."""
    rows = scores.read_facts("train")
    if "shuffled" in method:
        rows = shuffle_answers(rows, seed)
    source = folder / "rows.json"
    source.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    held_out = str(sources.SAMPLES / "facts_test.json")
    format = next((name for name in formats.TEMPLATES if name in method), "alpaca")
    dataset = data_set.prepare(DataConfig(source="json", source_path=[str(source)], test_path=held_out, seed=seed,
                                      format=format, output_dir=str(folder), overwrite=True))  # fmt: skip
    run = folder / "run"
    config = TrainConfig(dataset_path=str(dataset), output_dir=str(run), overwrite=True, num_epochs=epochs, batch_size=16,
                         lr_scheduler_type="cosine", seed=seed, **METHODS[method])  # fmt: skip
    result = train_run.train(config)
    # The tuned model is measured as it was trained: a quantised base stays quantised under its adapter.
    model, tokenizer = load.load_model(str(run), config), load.load_tokenizer(str(run))
    score = describe(scores.ask(model, tokenizer, test, format), test)
    return {"method": method, "seed": seed, "epochs": epochs, "seconds": result["metrics"]["seconds"], **score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--output", type=Path, default=MEASURED, help="default: the model card's figures, and the card")
    args = parser.parse_args()
    if args.output == MEASURED and (args.seeds, args.epochs) != (3, 1):
        parser.error("the model card holds 3 seeds of 1 epoch; for others name a file with --output")

    test, prose = scores.read_facts("test"), scores.read_facts("prose")
    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")
    score = scores.ask(model, tokenizer, test)
    base = describe(score, test)
    base["prose"] = {lang: fmean(scores.complete(model, tokenizer, [row for row in prose if row["language"] == lang]))
                     for lang in ("en", "ja")}  # fmt: skip
    first = [answer.split("\n")[0].strip() == row["output"] for answer, row in zip(score.answers, test, strict=True)]
    base["first_line"] = {lang: sum(ok for ok, row in zip(first, test, strict=True) if row["language"] == lang)
                          / sum(row["language"] == lang for row in test) for lang in ("en", "ja")}  # fmt: skip
    machine = f"{torch.get_num_threads()} CPU threads"
    kept = [run for run in files.read_json(args.output).get("runs", []) if run["method"] not in args.methods]
    table = {"machine": machine, "chance": chance(test), "base": base, "runs": kept}
    print(json.dumps(base, indent=1))
    for method in args.methods:
        for seed in range(1, args.seeds + 1):
            folder = Path(tempfile.mkdtemp())
            table["runs"].append(tune(method, seed, args.epochs, folder, test))
            shutil.rmtree(folder)
            print(json.dumps(table["runs"][-1]), flush=True)
    table["runs"].sort(key=lambda run: list(METHODS).index(run["method"]))
    files.write_json(args.output, table)
    if args.output == MEASURED:
        write_card(table)


if __name__ == "__main__":
    main()
