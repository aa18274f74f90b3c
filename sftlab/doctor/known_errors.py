"""Errors that are known: symptom, cause, fix. The table is known_errors.yaml; here it is read, and searched for in texts.

python -m sftlab.doctor.known_errors
"""

import functools
import itertools
import re
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).resolve().parent / "known_errors.yaml"
LONGEST = 300  # characters of a symptom that are shown
SECRET = re.compile(r"(hf)_(?:oauth_)?[A-Za-z0-9]{16,}|\b(api|sk)_[A-Za-z0-9]{8,}\b")  # not hf_quantizer

# what Python writes between an error and one that it led to
CHAINED = re.compile(r"(direct cause of the following exception|another exception occurred):\s*\Z")


@dataclass(frozen=True)
class Known:
    """A row of the table."""

    name: str
    what: str
    seen: tuple[re.Pattern, ...]
    cause: str
    fix: tuple[str, ...]
    read: str | None = None
    weak: bool = False


@dataclass(frozen=True)
class Finding:
    """A row that was found in a text: where, and in which words. `line` counts from 1."""

    name: str
    what: str
    symptom: str
    file: str
    line: int
    cause: str
    fix: tuple[str, ...]
    read: str | None
    weak: bool


@functools.cache
def load_table() -> tuple[Known, ...]:
    """The rows, in their order, which is their rank."""
    import yaml

    rows = yaml.load(TABLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(
        Known(**row | {"seen": tuple(re.compile(text, re.M) for text in row["seen"]), "fix": tuple(row["fix"])})
        for row in rows
    )


def hide(text: str) -> str:
    """The text without what is private: tokens, and the name of the home folder."""
    home = str(Path.home())
    text = SECRET.sub(lambda found: f"{found[1] or found[2]}_…", text)
    return re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text) if len(home) > 1 else text


def find_end(text: str) -> int:
    """Where the last failure of a text begins: its last chain of tracebacks that is not only a launcher's; else 0."""
    starts = [one.start() for one in re.finditer(r"^.*Traceback \(most recent call last\):", text, re.M)]
    blocks = [text[at:after] for at, after in itertools.pairwise([*starts, len(text)])]
    own = [number for number, block in enumerate(blocks) if "ChildFailedError" not in block]
    if not own:
        return 0
    last = own[-1]
    while CHAINED.search(text, 0, starts[last]):  # the cause belongs to it
        if not last:
            return 0
        last -= 1
    return starts[last]


def match(text: str, file: str) -> list[Finding]:
    """The rows that a text shows, the likeliest first: the strong ones, those of its last failure, then in the table's order."""
    end, found = find_end(text), []
    for rank, known in enumerate(load_table()):
        hits = [hit for pattern in known.seen for hit in pattern.finditer(text)]
        if not hits:
            continue
        hit = next((hit for hit in hits if hit.start() >= end), hits[-1])
        found.append((known.weak, hit.start() < end, rank, make_finding(known, hit, text, file)))
    return [finding for *_, finding in sorted(found, key=lambda one: one[:3])]


def make_finding(known: Known, hit: re.Match, text: str, file: str) -> Finding:
    """A row with the values that were found filled in."""
    start = text.rfind("\n", 0, hit.start()) + 1
    line = text[start : text.find("\n", hit.end()) if "\n" in text[hit.end() :] else len(text)]
    line = hide(line.strip().rsplit("\r", 1)[-1])  # first: a token that is cut in two is not recognised
    at = max(0, line.find(hide(hit.group())) - 80) if len(line) > LONGEST else 0
    words = {name: value for name, value in hit.groupdict().items() if value}

    def fill(sentence: str) -> str:
        for name, value in words.items():
            sentence = sentence.replace(f"{{{name}}}", value.rstrip("."))
        return hide(re.sub(r"\{[a-z]+\}", lambda left: left.group()[1:-1].upper(), sentence))

    symptom = ("…" if at else "") + line[at : at + LONGEST] + ("…" if len(line) > at + LONGEST else "")
    number, fixes = text.count("\n", 0, hit.start()) + 1, tuple(map(fill, known.fix))
    filled = (fill(known.what), symptom, hide(file), number, fill(known.cause), fixes)
    return Finding(known.name, *filled, known.read, known.weak)


def format_table() -> str:
    """The table as Markdown."""
    lines = ["| error | cause | fix |", "|---|---|---|"]
    cells = ((known.what, known.cause, "; ".join(known.fix)) for known in load_table())
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells)])


if __name__ == "__main__":
    print(format_table())
