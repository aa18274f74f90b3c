"""Errors that are known: symptom, cause, fix. The table is known_errors.yaml; here it is read, and searched for in texts.

python -c "from sftlab.doctor import known_errors; print(known_errors.match('KeyError: \\'text\\'', 'error.log'))"
"""

import functools
import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path

TABLE = Path(__file__).resolve().parent / "known_errors.yaml"
LONGEST = 300  # characters of a symptom that are shown
SECRET = re.compile(r"(hf)_(?:oauth_)?[A-Za-z0-9]{16,}|\b(api|sk)_[A-Za-z0-9]{8,}\b")  # not hf_quantizer

# what Python writes between an error and one that it led to
CHAINED = re.compile(r"(direct cause of the following exception|another exception occurred):\s*\Z")


@dataclass(frozen=True)
class KnownError:
    """A row of the table; of one that was found in a text also in which words, and where. `line` counts from 1.

    seen: the patterns that it is known by; weak: another error may have led to it.
    """

    name: str
    what: str
    seen: list[str]
    cause: str
    fix: list[str]
    read: str | None = None
    weak: bool = False
    symptom: str = ""
    file: str = ""
    line: int = 0


@functools.cache
def load_table() -> tuple[KnownError, ...]:
    """The rows, in their order, which is their rank."""
    import yaml

    rows = yaml.load(TABLE.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return tuple(KnownError(**row) for row in rows)


def hide(text: str) -> str:
    """The text without what is private: tokens, and the name of the home folder."""
    home = str(Path.home())
    text = SECRET.sub(lambda found: f"{found[1] or found[2]}_…", text)
    return re.sub(rf"{re.escape(home)}(?=/|\b)", "~", text) if len(home) > 1 else text


def find_end(text: str) -> int:
    """Where the last failure of a text begins: its last chain of tracebacks that is not only a launcher's; else 0."""
    starts = [one.start() for one in re.finditer(r"^.*Traceback \(most recent call last\):", text, re.M)]
    blocks = [text[at:after] for at, after in itertools.pairwise([*starts, len(text)])]
    chains = [at for at in starts if not CHAINED.search(text, 0, at)]  # the cause belongs to what it led to
    last = max((at for at, block in zip(starts, blocks, strict=True) if "ChildFailedError" not in block), default=0)
    return max((at for at in chains if at <= last), default=0)


def match(text: str, file: str, before: int | None = 0) -> list[KnownError]:
    """The rows that a text shows, the likeliest first: the strong ones, those of its last failure, then in the table's order.

    before: lines of the file before the text; None: the text is not in the file as lines.
    """
    end, found = find_end(text), []
    for known in load_table():
        hits = [hit for pattern in known.seen for hit in re.finditer(pattern, text, re.M)]
        if hits:
            hit = next((hit for hit in hits if hit.start() >= end), hits[-1])
            line = 0 if before is None else before + text.count("\n", 0, hit.start()) + 1
            found.append((known.weak, hit.start() < end, fill_in(known, hit, hide(file), line)))
    return [one for *_, one in sorted(found, key=lambda one: one[:2])]


def fill_in(known: KnownError, hit: re.Match, file: str, line: int) -> KnownError:
    """A row with what was found, and where."""
    text, end = hit.string, hit.string.find("\n", hit.end())
    symptom = text[text.rfind("\n", 0, hit.start()) + 1 : end if end >= 0 else len(text)]
    symptom = hide(symptom.strip().rsplit("\r", 1)[-1])  # first: a token that is cut in two is not recognised
    at = max(0, symptom.find(hide(hit.group())) - 80) if len(symptom) > LONGEST else 0
    symptom = "…" * bool(at) + symptom[at : at + LONGEST] + "…" * (len(symptom) > at + LONGEST)

    values = hit.groupdict()

    def fill(sentence: str) -> str:
        filled = re.sub(r"\{([a-z]+)\}", lambda word: (values.get(word[1]) or word[1].upper()).rstrip("."), sentence)
        return hide(filled)

    texts = {"what": fill(known.what), "cause": fill(known.cause), "fix": list(map(fill, known.fix))}
    return replace(known, **texts, symptom=symptom, file=file, line=line)
