"""What is wrong with rows that can be read: duplicates, contradictions, broken text, and what languages are there.

python -c "from sftlab.data import cleaning; print(cleaning.repair('æ\x9d±äº¬'))"
"""

import bisect
import os
import unicodedata
from collections import defaultdict

from sftlab.data.rows import COLUMNS, get_answer, get_prompt, get_texts
from sftlab.errors import UserError

SHINGLE = 5  # characters: short enough for Japanese, long enough that chance overlap is rare
PERMUTATIONS = 128  # of MinHash; its estimate of a similarity is off by about 1/sqrt(128) = 9 points
CANDIDATES = 100  # comparisons of one row: bounds the time where thousands of rows share most of their text


def fold(text: str) -> str:
    """A text without what a reader overlooks: width of characters, case, white space."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def has_system(row: dict) -> bool:
    return "messages" in row and row["messages"][0]["role"] == "system"


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
    import numpy

    codes = numpy.frombuffer(fold(text).encode("utf-32-le", "replace"), dtype=numpy.uint32).astype(numpy.uint64)
    if len(codes) < SHINGLE:
        codes = numpy.pad(codes, (0, SHINGLE - len(codes)))
    hashes = numpy.zeros(len(codes) - SHINGLE + 1, dtype=numpy.uint64)
    for offset in range(SHINGLE):  # polynomial in the odd constant of Knuth's multiplicative hashing, modulo 2**64
        hashes = (hashes + codes[offset : offset + len(hashes)] + numpy.uint64(1)) * numpy.uint64(11400714819323198485)
    return numpy.unique(hashes >> numpy.uint64(32))


def find_nearest(shingles, others, candidates) -> tuple[float, int]:
    """The highest Jaccard similarity among candidates, and whose it is: of equals the earliest; (0.0, 0) without any.

    shingles: sorted distinct hashes of a text; others: those of other texts, by the indices in `candidates`.
    """
    import numpy

    matches = [(0.0, 0)]  # the index as a negative number, so that max takes the earliest
    for other in sorted(candidates)[:CANDIDATES]:
        common = len(numpy.intersect1d(shingles, others[other], assume_unique=True))
        matches.append((common / (len(shingles) + len(others[other]) - common), -other))
    similarity, best = max(matches)
    return similarity, -best


def find_near(rows: list[dict], threshold: float = 0.9) -> dict[int, tuple[int, float]]:
    """Rows that nearly repeat an earlier one: index -> (index of that one, Jaccard similarity of their shingles).

    Candidates come from MinHash with locality-sensitive hashing (Broder 1997; datasketch), the similarity from the
    shingles themselves. Prompts and answers count; a system message, which many rows may share, doesn't. A row is compared
    with rows that are kept only, and with no more than the first hundred of them that look alike.
    """
    from datasketch import MinHash, MinHashLSH
    from tqdm.auto import tqdm

    index_of = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS)
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    kept, near = {}, {}
    quiet = len(rows) < 5000 or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    for index, row in enumerate(tqdm(rows, desc="near duplicates", leave=False, disable=quiet)):
        shingles = hash_shingles("\0".join(filter(None, get_texts(row)[has_system(row) :])))
        sketch = empty.copy()
        sketch.update_batch(shingles.tolist())
        similarity, best = find_nearest(shingles, kept, index_of.query(sketch))
        if similarity >= threshold:
            near[index] = (best, similarity)
        else:
            index_of.insert(index, sketch)
            kept[index] = shingles
    return near


def repair(text: str) -> str:
    """The text with mojibake undone, or as it is: UTF-8 that was read as Latin-1 or its kin (ftfy), or as CP932."""
    import ftfy

    try:
        undone = text.encode("cp932").decode("utf-8")  # Japanese in CP932 is hardly ever valid UTF-8 by chance
        if undone != text and any(letter >= "\u3041" for letter in undone):
            return undone
    except UnicodeError:
        pass
    return ftfy.fix_encoding(text)


def find_mojibake(rows: list[dict]) -> list[tuple[str, str, str]]:
    """(place, text, fixed text), shortened, of the texts that were decoded wrongly."""
    texts = [(row["place"], text) for row in rows for text in get_texts(row) if not text.isascii()]
    changed = [(place, text, repair(text)) for place, text in texts]
    return [(place, text[:60], fixed[:60]) for place, text, fixed in changed if fixed != text]


def has_controls(text: str) -> bool:
    """Whether a text holds control characters other than line breaks and tabs, or U+FFFD, where a character was lost."""
    return any(
        letter == "\ufffd" or (letter not in "\n\t\r" and unicodedata.category(letter) == "Cc") for letter in text
    )


def find_language(text: str) -> str:
    """`Japanese` with kana or kanji in a fifth of the letters or more, else `other script` or `Latin script`."""
    letters = [letter for letter in text if letter.isalpha()]
    japanese = sum("\u3041" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff" for letter in letters)
    latin = sum(letter < "\u0250" for letter in letters)
    if letters and japanese >= len(letters) / 5:
        return "Japanese"
    return "Latin script" if latin >= len(letters) / 2 else "other script"


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


def mend_texts(row: dict) -> dict:
    """The row with `repair` applied to each of its texts."""
    if "messages" in row:
        return row | {"messages": [turn | {"content": repair(turn["content"])} for turn in row["messages"]]}
    return row | {name: repair(row[name]) for name in COLUMNS}


def drop_special(rows: list[dict], tokenizer) -> tuple[list[dict], dict[str, str]]:
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
    if not kept:
        raise UserError(
            f"every row holds a special token, such as {held}, in its text; take the prompt format out of it."
        )
    return kept, dropped


# Held-out rows that the training rows give away: the same prompt, a prompt inside another, or nearly the same row.
#
# A score on rows that were trained on says how well they were memorised. `prepare` keeps equal prompts apart; a
# prompt with a polite word before it slips through, and so does what came into the set another way.


AROUND = " ?!.,:;…\"'()。、・「」『』"  # after NFKC, which makes full-width ones of these
SHORTEST = 6  # characters: a shorter prompt, such as "Hello", lies inside others by chance


def join_prompts(rows: list[dict]) -> tuple[str, list[int]]:
    """The last prompts as one text, a line each, and where in it each begins: one search looks through all."""
    texts, starts, at = [trim(get_last_prompt(row)) for row in rows], [], 0
    for text in texts:
        starts.append(at)
        at += len(text) + 1
    return "\n".join(texts) + "\n", starts


def find_inside(prompt: str, joined: str, starts: list[int]):
    """The rows whose prompt holds this one, not cut out of a longer word or number, one after the other."""
    wanted, at = trim(prompt), -1
    while len(wanted) >= SHORTEST and (at := joined.find(wanted, at + 1)) >= 0:
        before, after = joined[max(0, at - 1) : at], joined[at + len(wanted)]
        if not (is_spaced(before) and is_spaced(wanted[0]) or is_spaced(after) and is_spaced(wanted[-1])):
            yield bisect.bisect_right(starts, at) - 1


def find_nested(train: list[dict], held_out: list[dict]) -> dict[int, int]:
    """Held-out row -> the first training row whose last prompt lies whole in its own, or the other way round.

    Both must have the same answer: "Tell me a joke" is no leak of "Tell me a joke about cats".
    """
    answers = [[fold(get_answer(row)) for row in rows] for rows in (train, held_out)]
    found, joined = {}, join_prompts(train)
    for number, row in enumerate(held_out):
        for longer in find_inside(get_last_prompt(row), *joined):
            if answers[0][longer] == answers[1][number]:
                found.setdefault(number, longer)
    joined = join_prompts(held_out)
    for number, row in enumerate(train):
        for longer in find_inside(get_last_prompt(row), *joined):
            if answers[0][number] == answers[1][longer]:
                found.setdefault(longer, number)
    return found


def get_last_prompt(row: dict) -> str:
    """What is asked in a row, of a conversation its last question."""
    if "messages" in row:
        return next((turn["content"] for turn in reversed(row["messages"]) if turn["role"] == "user"), "")
    return get_prompt(row)


def trim(text: str) -> str:
    """A prompt for comparison: width and case folded, one line, without punctuation around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(AROUND)


def is_spaced(letter: str) -> bool:
    """Whether a letter or digit belongs to a word that spaces would end; those of Japanese and Chinese don't."""
    return letter.isalnum() and letter < "\u2e80"


def find_leaks(train: list[dict], held_out: list[dict], threshold: float = 0.9) -> dict[int, dict]:
    """Held-out row -> `why`, the `train` row that gives it away, and how `similar` they are, in 0..1.

    `same prompt` is equal but for case, width and punctuation around it; `prompt inside` stands whole in a longer one, as
    after "Please tell me:", in the one set or the other, and has the same answer; `near duplicate` has a Jaccard similarity of `threshold` or
    more between the runs of five characters of prompt and answer (`find_near`; MinHash: Broder 1997).
    """
    from datasketch import MinHash, MinHashLSH
    from tqdm.auto import tqdm

    index_of = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=PERMUTATIONS)
    empty, shingles, prompts = MinHash(num_perm=PERMUTATIONS, hashfunc=int), [], {}
    nested = find_nested(train, held_out)

    def sketch(row: dict):
        hashes = hash_shingles("\0".join(filter(None, get_texts(row)[has_system(row) :])))
        minima = empty.copy()
        minima.update_batch(hashes.tolist())
        return hashes, minima

    quiet = len(train) < 5000 or "TQDM_DISABLE" in os.environ  # which tqdm's bar for notebooks doesn't read
    for number, row in enumerate(tqdm(train, desc="leaks", leave=False, disable=quiet)):
        hashes, minima = sketch(row)
        shingles.append(hashes)
        index_of.insert(number, minima)
        prompts.setdefault(trim(get_prompt(row)), number)
    leaks = {}
    for number, row in enumerate(held_out):
        if (same := prompts.get(trim(get_prompt(row)))) is not None:
            leaks[number] = {"why": "same prompt", "train": same, "similar": 1.0}
            continue
        if number in nested:
            leaks[number] = {"why": "prompt inside", "train": nested[number], "similar": 1.0}
            continue
        hashes, minima = sketch(row)
        similar, best = find_nearest(hashes, shingles, index_of.query(minima))
        if similar >= threshold:
            leaks[number] = {"why": "near duplicate", "train": best, "similar": round(similar, 3)}
    return leaks


def count_seen_answers(train: list[dict], held_out: list[dict]) -> int:
    """How many held-out rows have an answer that some training row has: no leak in itself, where answers are few."""
    known = {fold(get_answer(row)) for row in train}
    return sum(fold(get_answer(row)) in known for row in held_out)
