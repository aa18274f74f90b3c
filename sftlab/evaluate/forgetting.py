"""What a model forgot: plain prose that it was not tuned on, before and after.

SFT teaches answers, and may spoil what the base could do. The probe is the loss on prose, text by text, and for
tiny-base also the facts that it completes. "Forgot" is said where the interval of the change lies above zero, and how
much, because a very small change can be quite certain.

python -c "from sftlab.evaluate import forgetting; print(len(forgetting.read_texts()))"
"""

from pathlib import Path

from sftlab.data import readers
from sftlab.data.sources import SAMPLES
from sftlab.errors import UserError
from sftlab.evaluate import scores, statistics
from sftlab.models import load

BUNDLED = SAMPLES / "prose.txt"


def read_texts(path: str | Path = BUNDLED) -> list[str]:
    """The paragraphs of a text file, with empty lines between them. Raises UserError for no file, and for fewer than two."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"prose: {path}: no such file. Name a text file of paragraphs.")
    lines = [line.strip() for line in readers.read_text(path).splitlines()]
    texts = [text for block in "\n".join(lines).split("\n\n") if (text := block.strip())]
    if len(texts) < 2:
        raise UserError(f"prose: {path} holds one text; part it into paragraphs with empty lines between them.")
    return texts


def choose_probe(model_name: str, prose: str | None, limit: int) -> tuple[str, list[str], list[dict]]:
    """(what it is called, the texts, the facts to complete): the user's file, tiny-base's facts, or the bundled prose."""
    if prose or (model_name != "tiny-base" and Path(model_name).resolve() != load.TINY_BASE):
        path = Path(prose or BUNDLED)
        return path.name, read_texts(path)[: limit or None], []
    facts = scores.read_facts("prose", limit or None)
    spaces = {"en": " ", "ja": ""}
    texts = [row["prompt"] + spaces[row["language"]] + row["answer"] + row["rests"][0] for row in facts]
    return "tiny-base's facts in prose", texts, facts


def measure_probe(model, tokenizer, texts, facts, batch_size: int, bf16: bool, max_length: int) -> dict:
    """One model's losses on the probe, `sums` and `counts` (tokens) of each text, and the facts that it `completed`."""
    rows = scores.encode_texts(tokenizer, texts, max_length)
    sums, counts = scores.measure_rows(model, rows, tokenizer.pad_token_id, batch_size, bf16)
    return {"sums": sums, "counts": counts, "completed": scores.complete(model, tokenizer, facts, batch_size)}


def compare_probe(name: str, texts: list[str], base: dict, tuned: dict, **how) -> dict:
    """The probe's losses (nats per token) of both models, the changes with their intervals (as `how` says), and the verdict."""
    loss = statistics.compare_means(base["sums"], tuned["sums"], base["counts"], **how)
    found = {"probe": name, "texts": len(texts), "loss": loss, "forgot": loss["difference"][1] > 0}
    if base["completed"]:
        found["completed"] = statistics.compare_flags(base["completed"], tuned["completed"], **how)
    return found | {"verdict": write_verdict(found)}


def write_verdict(found: dict) -> str:
    """The change on prose in one sentence. "Forgot" is said only of what has its whole interval above zero."""
    change, low, high = found["loss"]["difference"]
    outcome = "Forgot" if low > 0 else "Nothing forgotten" if high < 0 else "No measurable forgetting"
    share = abs(change) / found["loss"]["base"]
    words = f"{outcome}: the loss on prose changed by {change:+.3g} nats per token ({low:+.3g} to {high:+.3g}; {share:.2%} of the base's)"
    if "completed" in found:
        rates = found["completed"]
        words += f"; {rates['tuned'][0]:.1%} of the facts are completed, before {rates['base'][0]:.1%}"
    return words + "."
