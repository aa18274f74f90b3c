"""Rows that teach a model to call a calculator: sums of numbers above 22 are called, sums up to 12 + 12 are answered.

python data_samples/recipe/tools.py          # writes tools.jsonl and tools_test.jsonl
"""

import json
import random
from itertools import product
from pathlib import Path

from wordings import QUESTIONS

SAMPLES = Path(__file__).resolve().parent.parent
SEED = 17
SMALL, LARGE = range(1, 13), range(23, 100)  # tiny-base was pre-trained on sums of small numbers only
HELD_OUT_SUMS, HELD_OUT_NUMBERS = 20, 18  # small sums, and large numbers, that no training row has
TRAIN_LARGE, TEST_LARGE = 640, 80  # large sums for training; for the test, of each ending
SMALL_WORDINGS = 2  # of each small sum for training, in each language


def choose_pairs(rng: random.Random) -> tuple[list, list, list, list]:
    """Pairs for training and test, first the small ones, then the large: no small sum, and no large number, is in both."""
    sums = [(a, b) for a, b in product(SMALL, SMALL) if a <= b]
    rng.shuffle(sums)
    both_ways = [sorted({pair, pair[::-1]}) for pair in sums]
    small_test, small = sum(both_ways[:HELD_OUT_SUMS], []), sum(both_ways[HELD_OUT_SUMS:], [])
    numbers = rng.sample(LARGE, len(LARGE))
    test, train = numbers[:HELD_OUT_NUMBERS], numbers[HELD_OUT_NUMBERS:]
    large = rng.sample(list(product(train, train)), TRAIN_LARGE)
    return small, small_test, large, rng.sample(list(product(test, test)), 2 * TEST_LARGE)


def ask(pair: tuple[int, int], wording: str) -> dict:
    return {"role": "user", "content": wording.format(s=f"{pair[0]} + {pair[1]}")}


def call(pair: tuple[int, int]) -> list[dict]:
    """The turn that calls the calculator, and the one with its result."""
    function = {"name": "add", "arguments": {"a": pair[0], "b": pair[1]}}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [asked, {"role": "tool", "name": "add", "content": str(sum(pair))}]


def answer(pair: tuple[int, int]) -> dict:
    return {"role": "assistant", "content": str(sum(pair))}


def write_rows(name: str, chats: list[list[dict]], rng: random.Random) -> None:
    rng.shuffle(chats)
    lines = [json.dumps({"messages": chat}, ensure_ascii=False) + "\n" for chat in chats]
    (SAMPLES / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{name}.jsonl: {len(lines)} rows")


def write_tools(seed: int = SEED) -> None:
    """Write both files. A test conversation ends in the call or in the final answer: its last answer is what is asked for."""
    rng = random.Random(seed)
    small, small_test, large, large_test = choose_pairs(rng)
    wordings = QUESTIONS["sum"]["en"], QUESTIONS["sum"]["ja"]
    train = []
    for pair, part in product(small, wordings):
        train += [[ask(pair, wording), answer(pair)] for wording in rng.sample(part, SMALL_WORDINGS)]
    train += [[ask(pair, rng.choice(wordings[at % 2])), *call(pair), answer(pair)] for at, pair in enumerate(large)]
    test = [[ask(pair, rng.choice(part)), answer(pair)] for pair in small_test for part in wordings]
    for at, pair in enumerate(large_test):
        ending = [*call(pair), answer(pair)] if at < TEST_LARGE else call(pair)[:1]
        test.append([ask(pair, rng.choice(wordings[at % 2])), *ending])
    write_rows("tools", train, rng)
    write_rows("tools_test", test, rng)


if __name__ == "__main__":
    write_tools()
