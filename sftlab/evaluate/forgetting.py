"""What a model forgot: plain prose that it was not tuned on, before and after.

SFT teaches answers, and may spoil what the base could do. The probe is the loss on prose, text by text, and for
tiny-base also the facts that it completes. "Forgot" is said where the interval of the change lies above zero, and how
much, because a very small change can be quite certain.

python -c "from sftlab.evaluate import forgetting; print(len(forgetting.read_texts()))"
"""

import math
from pathlib import Path

from sftlab.data import readers
from sftlab.data.cleaning import find_language
from sftlab.data.sources import SAMPLES
from sftlab.errors import UserError
from sftlab.evaluate import scores, statistics
from sftlab.models import load

BUNDLED = SAMPLES / "prose.jsonl"


def read_texts(path: str | Path = BUNDLED) -> list[str]:
    """The texts of a file: paragraphs of a .txt, with empty lines between them, or `text` of each row of a .jsonl.

    Raises UserError for a file that is not there, is of another kind, or holds fewer than two texts.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"prose: {path}: no such .txt or .jsonl file. Name one with paragraphs, or rows with `text`.")
    if path.suffix == ".txt":
        blocks = "\n".join(line.strip() for line in readers.read_text(path).splitlines()).split("\n\n")
        texts = [block.strip() for block in blocks if block.strip()]
    else:
        rows = readers.read_jsonl(path)
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not isinstance(row.get("text"), str) or not row["text"].strip():
                raise UserError(f"prose: {path}: row {number} has no `text`. Each row must be an object with one.")
        texts = [row["text"] for row in rows]
    if len(texts) < 2:
        raise UserError(
            f"prose: {path} holds {len(texts)} text; part it into paragraphs with empty lines between them."
        )
    return texts


def is_tiny_base(name: str) -> bool:
    return name == "tiny-base" or Path(name).resolve() == load.TINY_BASE


def choose_probe(model_name: str, prose: str | None, limit: int) -> tuple[str, list[str], list[dict]]:
    """(what it is called, the texts, the facts to complete): the user's file, tiny-base's facts, or the bundled prose."""
    if prose:
        return Path(prose).name, read_texts(prose)[: limit or None], []
    if not is_tiny_base(model_name):
        return f"{SAMPLES.name}/{BUNDLED.name}", read_texts()[: limit or None], []
    facts = scores.read_facts("prose", limit or None)  # in random order, so a head is a sample
    return "tiny-base's facts in prose", [to_sentence(row) for row in facts], facts


def to_sentence(row: dict) -> str:
    """A fact as pre-training wrote it: beginning, answer and the usual end."""
    return row["prompt"] + (" " if row["language"] == "en" else "") + row["answer"] + row["rests"][0]


def measure(
    model, tokenizer, texts: list[str], facts: list[dict], batch_size: int, bf16: bool, max_length: int
) -> dict:
    """What one model makes of the probe: `sums` and `counts` (tokens) of each text, `bytes`, and the facts completed."""
    rows = scores.encode_texts(tokenizer, texts, max_length)
    sums, counts = scores.measure_rows(model, rows, tokenizer.pad_token_id, batch_size, bf16)
    kept = [len(tokenizer.decode(row["input_ids"], skip_special_tokens=True).encode()) for row in rows]
    completed = scores.find_completed(model, tokenizer, facts, batch_size=batch_size) if facts else []
    return {"sums": sums, "counts": counts, "bytes": sum(kept), "completed": completed}


def compare(name: str, texts: list[str], base: dict, tuned: dict, **how) -> dict:
    """The probe's numbers for both models, with the intervals of the changes, and in one sentence what they say.

    `loss` is in nats per token, `bits_per_byte` the same per byte of text, which models with different tokenizers share.
    how: level, resamples and seed of `statistics.compare_rows`.
    """
    sums, counts = (base["sums"], tuned["sums"]), base["counts"]
    losses = {key: float(part.sum() / counts.sum()) for key, part in zip(("base", "tuned"), sums, strict=True)}
    change = statistics.compare_rows(*sums, counts, **how)
    found = {
        "probe": name, "texts": len(texts), "tokens": int(counts.sum()),
        "loss": losses | {"difference": list(change)},
        "bits_per_byte": {key: losses[key] * float(counts.sum()) / base["bytes"] / math.log(2) for key in losses},
        "languages": {}, "forgot": change[1] > 0,
    }  # fmt: skip
    languages = [find_language(text) for text in texts]
    for language in sorted(set(languages)):
        kept = [number for number, one in enumerate(languages) if one == language]
        if not counts[kept].sum():
            continue
        parts = (sums[0][kept], sums[1][kept], counts[kept])
        found["languages"][language] = {
            "base": float(parts[0].sum() / parts[2].sum()), "tuned": float(parts[1].sum() / parts[2].sum()),
            "difference": list(statistics.compare_rows(*parts, **how)),
        }  # fmt: skip
    if base["completed"]:
        found["completed"] = scores.compare_flags(base["completed"], tuned["completed"], **how)
    return found | {"verdict": describe(found)}


def describe(found: dict) -> str:
    """The change on prose in one sentence. "Forgot" is said only of what has its whole interval above zero."""
    change, low, high = found["loss"]["difference"]
    share = relate(change, found["loss"]["base"])
    size = f"{abs(change):.3g} nats per token ({share} of the base's; {low:+.3g} to {high:+.3g})"
    if low > 0:
        words = f"Forgot: the loss on prose is higher by {size}"
    elif high < 0:
        words = f"Nothing forgotten overall: the loss on prose is lower by {size}"
    else:
        words = (
            f"No measurable forgetting overall: the loss on prose changed by {low:+.3g} to {high:+.3g} nats per token"
        )
    worse = [f"{name} {part['difference'][0]:+.3g} ({relate(part['difference'][0], part['base'])})"
             for name, part in found["languages"].items() if part["difference"][1] > 0]  # fmt: skip
    if worse and len(found["languages"]) > 1:
        words += f"; forgot in {', '.join(worse)}"
    if "completed" in found:
        rates = found["completed"]
        words += f"; {rates['tuned'][0]:.1%} of the facts are completed, before {rates['base'][0]:.1%}"
    return words + "."


def relate(change: float, base: float) -> str:
    """A change as a share of what it changed, in percent."""
    return f"{abs(change) / base:.1%}" if abs(change) >= 0.001 * base else "less than 0.1%"
