"""What is wrong with rows that can be read: duplicates, contradictions, leaks, broken text; and what languages are there.

python -c "from sftlab.data import cleaning; print(cleaning.repair('æ\x9d±äº¬'))"
"""

import contextlib
import os
import unicodedata
from collections import defaultdict

import ftfy
import numpy
from tqdm.auto import tqdm

from sftlab.data.readers import require_rows
from sftlab.data.rows import get_answer, get_prompt, get_texts, to_messages

SHINGLE = 5  # characters: short enough for Japanese, long enough that chance overlap is rare
PERMUTATIONS = 128  # of MinHash; its estimate of a similarity is off by about 1/sqrt(128) = 9 points
SHORTEST = 6  # bytes of a prompt inside another; fewer are there by chance: "Hi" is in "Is this high?"; a kanji has 3
CANDIDATES = 100  # comparisons of one row: bounds the time where thousands of rows share most of their text
AROUND = " ?!.,:;…\"'()。、・「」『』"  # after NFKC, which makes full-width ones of these


def fold(text: str) -> str:
    """A text without what a reader overlooks: width of characters, case, white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def find_exact(rows: list[dict]) -> dict[int, int]:
    """Rows that repeat an earlier one's prompt and answer, as a reader sees them: index -> index of the first."""
    seen, repeats = {}, {}
    for index, row in enumerate(rows):
        first = seen.setdefault((fold(get_prompt(row)), fold(get_answer(row))), index)
        if first != index:
            repeats[index] = first
    return repeats


def find_conflicts(rows: list[dict]) -> list[list[int]]:
    """Groups of rows with one prompt and more than one answer."""
    groups = defaultdict(list)
    for index, row in enumerate(rows):
        groups[fold(get_prompt(row))].append(index)
    return [group for group in groups.values() if len({fold(get_answer(rows[index])) for index in group}) > 1]


def hash_shingles(text: str):
    """Hashes (uint64) of all runs of five characters of a folded text, each once."""
    codes = numpy.frombuffer(fold(text).encode("utf-32-le", "replace"), dtype=numpy.uint32).astype(numpy.uint64)
    if len(codes) < SHINGLE:
        codes = numpy.pad(codes, (0, SHINGLE - len(codes)))
    hashes = numpy.zeros(len(codes) - SHINGLE + 1, dtype=numpy.uint64)
    for offset in range(SHINGLE):  # polynomial in the odd constant of Knuth's multiplicative hashing, modulo 2**64
        hashes = (hashes + codes[offset : offset + len(hashes)] + numpy.uint64(1)) * numpy.uint64(11400714819323198485)
    return numpy.unique(hashes >> numpy.uint64(32))


class NearRows:
    """Rows by number, to find the one most like another: MinHash with locality-sensitive hashing picks candidates
    (Broder 1997; datasketch), the Jaccard similarity of their shingles decides.

    Prompts and answers count; a system message, which many rows may share, doesn't.
    """

    def __init__(self, threshold: float):
        from datasketch import MinHash, MinHashLSH

        self.sketches = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS)
        self.empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
        self.shingles = {}

    def sketch(self, row: dict) -> tuple:
        """A row's shingles, and their minima."""
        texts = [turn["content"] for turn in to_messages(row, "\0") if turn["role"] != "system"]
        shingles, minima = hash_shingles("\0".join(texts)), self.empty.copy()
        minima.update_batch(shingles.tolist())
        return shingles, minima

    def add(self, number: int, sketch: tuple) -> None:
        self.shingles[number] = sketch[0]
        self.sketches.insert(number, sketch[1])

    def find_nearest(self, sketch: tuple) -> tuple[float, int]:
        """The highest similarity among the first hundred candidates, and whose it is: of equals the earliest; (0.0, 0) without any."""
        best = 0.0, 0
        for number in sorted(self.sketches.query(sketch[1]))[:CANDIDATES]:
            one, other = sketch[0], self.shingles[number]
            common = len(numpy.intersect1d(one, other, assume_unique=True))
            best = max(best, (common / (len(one) + len(other) - common), number), key=lambda match: match[0])
        return best


def find_near(rows: list[dict], threshold: float = 0.9) -> dict[int, tuple[int, float]]:
    """Rows that nearly repeat an earlier one that is kept: index -> (index of that one, Jaccard similarity)."""
    kept = defaultdict(lambda: NearRows(threshold))  # by the system message: rows that differ in it are no repeats
    near = {}
    quiet = len(rows) < 5000 or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    for index, row in enumerate(tqdm(rows, desc="near duplicates", leave=False, disable=quiet)):
        alike = kept[fold("".join(turn["content"] for turn in to_messages(row) if turn["role"] == "system"))]
        sketch = alike.sketch(row)
        similarity, best = alike.find_nearest(sketch)
        if similarity >= threshold:
            near[index] = (best, similarity)
        else:
            alike.add(index, sketch)
    return near


def find_leaks(train: list[dict], held_out: list[dict], threshold: float = 0.9) -> dict[int, dict]:
    """Held-out row -> `why`, the `train` row that gives it away, and how `similar` they are, in 0..1.

    A score on rows that were trained on says how well they were memorised. `same prompt` is equal but for case, width, white
    space and punctuation around it; `prompt inside` has the same answer, and one of the prompts stands whole in the other, as
    after "Please tell me:"; `near duplicate` has a Jaccard similarity of `threshold` or more.
    """
    trained, prompts, answers = NearRows(threshold), {}, defaultdict(list)
    for number, row in enumerate(train):
        trained.add(number, trained.sketch(row))
        asked = fold(get_prompt(row)).strip(AROUND)
        prompts.setdefault(asked, number)
        answers[fold(get_answer(row))].append((asked, number))
    leaks = {}
    for number, row in enumerate(held_out):
        asked, alike = fold(get_prompt(row)).strip(AROUND), answers[fold(get_answer(row))]
        nested = [(min(asked, prompt, key=len), at) for prompt, at in alike if asked in prompt or prompt in asked]
        inside = [at for shorter, at in nested if len(shorter.encode()) >= SHORTEST]
        if asked in prompts:
            leaks[number] = {"why": "same prompt", "train": prompts[asked], "similar": 1.0}
        elif inside:
            leaks[number] = {"why": "prompt inside", "train": inside[0], "similar": 1.0}
        else:
            similar, best = trained.find_nearest(trained.sketch(row))
            if similar >= threshold:
                leaks[number] = {"why": "near duplicate", "train": best, "similar": round(similar, 3)}
    return leaks


def repair(text: str) -> str:
    """The text with mojibake undone, or as it is: UTF-8 that was read as Latin-1 or its kin (ftfy), or as CP932."""
    with contextlib.suppress(UnicodeError):
        undone = text.encode("cp932").decode("utf-8")  # Japanese in CP932 is hardly ever valid UTF-8 by chance
        if undone != text and any(letter >= "\u3041" for letter in undone):
            return undone
    return ftfy.fix_encoding(text)


def find_mojibake(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(place, text, fixed text), shortened, of the texts that were decoded wrongly."""
    texts = [(row["place"], text) for row in rows for text in get_texts(row) if not text.isascii()]
    changed = [(place, text, repair(text)) for place, text in texts]
    return [(place, text[:60], fixed[:60]) for place, text, fixed in changed if fixed != text]


def has_controls(text: str) -> bool:
    """Whether a text holds control characters other than line breaks and tabs, or U+FFFD, where a character was lost."""
    return any(unicodedata.category(letter) == "Cc" for letter in set(text) - set("\n\t\r")) or "\ufffd" in text


def find_language(text: str) -> str:
    """`Japanese` with kana or kanji in a fifth of the letters or more, else `other script` or `Latin script`."""
    letters = [letter for letter in text if letter.isalpha()]
    japanese = sum("\u3041" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" for letter in letters)
    latin = sum(letter < "\u0250" for letter in letters)
    if letters and japanese >= len(letters) / 5:
        return "Japanese"
    return "Latin script" if latin >= len(letters) / 2 else "other script"


def drop_special(rows: list[dict], tokenizer, name: str = "the set") -> tuple[list[dict], dict[str, str]]:
    """Rows without those whose text holds a special token: tokenised, it would end the text, or begin another turn."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    special = sorted({token for token in (*added, *tokenizer.all_special_tokens) if token.strip()})
    kept, dropped = [], {}
    for row in rows:
        held = next((token for token in special if any(token in text for text in get_texts(row))), None)
        if held:
            dropped[row["place"]] = f"its text holds the special token {held}"
        else:
            kept.append(row)
    require_rows(kept, dropped, name)
    return kept, dropped


def drop_repeats(rows: list[dict], found: dict, dedupe: str) -> tuple[list[dict], dict[str, str]]:
    """Rows without the duplicates that `report.inspect_rows` found, and place -> why for those dropped."""
    dropped = {}
    if dedupe != "off":
        dropped |= {place: f"repeats {first}" for place, first in found["exact_duplicates"]}
    if dedupe == "near":
        dropped |= {place: f"is like {first} ({value:.0%})" for place, first, value in found["near_duplicates"]}
    return [row for row in rows if row["place"] not in dropped], dropped


def drop_leaks(rows: list[dict], held_out: list[dict]) -> tuple[list[dict], dict[str, str]]:
    """Training rows whose prompt, as a reader sees it, isn't among the held-out ones; and place -> why for the others."""
    asked = {fold(get_prompt(row)) for row in held_out}
    leaks = {row["place"]: "its prompt is held out" for row in rows if fold(get_prompt(row)) in asked}
    return [row for row in rows if row["place"] not in leaks], leaks
