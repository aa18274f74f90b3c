"""Held-out rows that the training rows give away: the same prompt, a prompt inside another, or nearly the same row.

A score on rows that were trained on says how well they were learned by heart. `prepare` keeps equal prompts apart; a
prompt with a polite word before it slips through, and so does what came into the set another way.

python -c "from sftlab import leakage; help(leakage.find_leaks)"
"""

import bisect
import os
import unicodedata

from sftlab import cleaning
from sftlab.rows import get_answer, get_prompt, get_texts

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
    answers = [[cleaning.fold(get_answer(row)) for row in rows] for rows in (train, held_out)]
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
    more between the runs of five characters of prompt and answer (`cleaning.find_near`; MinHash: Broder 1997).
    """
    import numpy
    from datasketch import MinHash, MinHashLSH
    from tqdm.auto import tqdm

    index_of = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=cleaning.PERMUTATIONS)
    empty, shingles, prompts = MinHash(num_perm=cleaning.PERMUTATIONS, hashfunc=int), [], {}
    nested = find_nested(train, held_out)

    def sketch(row: dict):
        hashes = cleaning.hash_shingles("\0".join(filter(None, get_texts(row)[cleaning.has_system(row) :])))
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
        matches = [(0.0, 0)]  # similarity, and the row as a negative number: of equals the earliest wins
        for other in sorted(index_of.query(minima))[: cleaning.CANDIDATES]:
            common = len(numpy.intersect1d(hashes, shingles[other], assume_unique=True))
            matches.append((common / (len(hashes) + len(shingles[other]) - common), -other))
        similar, best = max(matches)
        if similar >= threshold:
            leaks[number] = {"why": "near duplicate", "train": -best, "similar": round(similar, 3)}
    return leaks


def count_seen_answers(train: list[dict], held_out: list[dict]) -> int:
    """How many held-out rows have an answer that some training row has: no leak in itself, where answers are few."""
    known = {cleaning.fold(get_answer(row)) for row in train}
    return sum(cleaning.fold(get_answer(row)) in known for row in held_out)
