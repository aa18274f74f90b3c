"""Measure tiny-base: what it knows, what it can answer before and after SFT, by method and seed, with intervals.

python data_samples/recipe/measure.py                 # the whole table, about 15 minutes on 2 CPU cores
python data_samples/recipe/measure.py --methods lora --seeds 1
"""

import argparse
import json
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import torch

from sftlab import data, evaluate, files, formats, models, train
from sftlab.config import DataConfig, TrainConfig

LORA = {"use_lora": True, "learning_rate": 3e-3}
METHODS = {
    "full": {"learning_rate": 5e-4},
    "lora": LORA,
    "lora 8-bit": LORA | {"use_8bit": True},
    "lora 4-bit": LORA | {"use_4bit": True},
    "lora, shuffled answers": LORA,
}


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


def describe(score: evaluate.Score, rows: list[dict]) -> dict:
    """Exact match with its interval for both languages, the share that ended, and exact match by relation."""
    languages = {lang: score.select([row["language"] == lang for row in rows]) for lang in ("en", "ja")}
    relations = sorted({row["relation"] for row in rows})
    return {
        **{lang: [part.exact_match, *part.interval] for lang, part in languages.items()},
        "ended": sum(score.ended) / len(score.ended),
        "relations": {name: score.select([row["relation"] == name for row in rows]).exact_match for name in relations},
    }


def tune(method: str, seed: int, epochs: float, folder: Path, test: list[dict]) -> dict:
    """One SFT run of a method and its score on the held-out questions."""
    rows = evaluate.read_facts("train")
    if "shuffled" in method:
        rows = shuffle_answers(rows, seed)
    source = folder / "rows.json"
    source.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    held_out = str(data.SAMPLES / "facts_test.json")
    dataset = data.prepare(DataConfig(source="json", source_path=str(source), test_path=held_out, seed=seed,
                                      output_dir=str(folder), overwrite=True))  # fmt: skip
    run = folder / "run"
    config = TrainConfig(dataset_path=str(dataset), output_dir=str(run), overwrite=True, num_epochs=epochs, batch_size=16,
                         lr_scheduler_type="cosine", seed=seed, **METHODS[method])  # fmt: skip
    result = train.train(config)
    # The tuned model is measured as it was trained: a quantised base stays quantised under its adapter.
    model, tokenizer = models.load_model(str(run), config), models.load_tokenizer(str(run))
    score = describe(evaluate.ask(model, tokenizer, test), test)
    return {"method": method, "seed": seed, "epochs": epochs, "seconds": result["metrics"]["seconds"], **score}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS).replace(", ", "; "), help="names with commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--output", type=Path, default=models.TINY_BASE / "measured.json")
    args = parser.parse_args()

    test, prose = evaluate.read_facts("test"), evaluate.read_facts("prose")
    model, tokenizer = models.load_model("tiny-base"), models.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")
    base = describe(evaluate.ask(model, tokenizer, test), test)
    base["prose"] = {lang: evaluate.complete(model, tokenizer, [row for row in prose if row["language"] == lang])
                     for lang in ("en", "ja")}  # fmt: skip
    table = {"threads": torch.get_num_threads(), "chance": chance(test), "base": base, "runs": []}
    print(json.dumps(base, indent=1))
    for method in [name.strip().replace(";", ",") for name in args.methods.split(",")]:
        for seed in range(1, args.seeds + 1):
            folder = Path(tempfile.mkdtemp())
            table["runs"].append(tune(method, seed, args.epochs, folder, test))
            shutil.rmtree(folder)
            print(json.dumps(table["runs"][-1]), flush=True)
            files.write_json(args.output, table)


if __name__ == "__main__":
    main()
