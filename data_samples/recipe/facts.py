"""The facts that tiny-base knows: tables in `data_samples/facts/`, read into one flat list.

A fact is (relation, language, subject, answer): ("capital", "en", "France", "Paris"). Facts about one thing share a
`group`, whatever the language, so that a split by group never asks in one language what it taught in the other.

    python data_samples/recipe/facts.py          # writes facts_train.json, facts_test.json and facts_prose.json
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

from wordings import QUESTIONS, STATEMENTS

SAMPLES = Path(__file__).resolve().parent.parent
SEED = 17
# table -> its relations; a relation reads the columns NAME_en and NAME_ja, or NAME where both languages share it.
TABLES = {
    "countries": {"capital": "capital", "currency": "currency", "continent": "continent", "language": "language"},
    "prefectures": {"prefecture_capital": "capital", "region": "region"},
    "elements": {"symbol": "symbol", "number": "number"},
    "animals": {"class": "class", "diet": "diet"},
}
WITH_THE = {
    "Bahamas", "Central African Republic", "Comoros", "DR Congo", "Dominican Republic", "Gambia", "Maldives",
    "Marshall Islands", "Netherlands", "Philippines", "Republic of the Congo", "Seychelles", "Solomon Islands",
    "United Arab Emirates", "United Kingdom", "United States",
}  # fmt: skip


@dataclass(frozen=True)
class Fact:
    relation: str
    lang: str
    subject: str
    answer: str
    group: str


def read_facts() -> list[Fact]:
    """Every fact of every table in English and Japanese, and sums up to 12 + 12, in a fixed order."""
    facts = []
    for table, relations in TABLES.items():
        with open(SAMPLES / "facts" / f"{table}.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            for relation, column in relations.items():
                for lang in ("en", "ja"):
                    answer = row.get(f"{column}_{lang}") or row[column]
                    subject = row[f"name_{lang}"]
                    if lang == "en" and table == "countries" and subject in WITH_THE:
                        subject = f"the {subject}"
                    facts.append(Fact(relation, lang, subject, answer, f"{table}/{row['name_en']}"))
    for a in range(1, 13):
        for b in range(1, 13):
            group = f"sums/{min(a, b)}+{max(a, b)}"
            facts += [Fact("sum", lang, f"{a} + {b}", str(a + b), group) for lang in ("en", "ja")]
    return facts


def split_groups(facts: list[Fact], seed: int = SEED) -> tuple[list[Fact], list[Fact]]:
    """Half of the things of each table for training, the other half held out, in both languages alike."""
    rng = random.Random(seed)
    train_groups = set()
    for table in sorted({fact.group.split("/")[0] for fact in facts}):
        groups = sorted({fact.group for fact in facts if fact.group.startswith(f"{table}/")})
        rng.shuffle(groups)
        train_groups |= set(groups[: len(groups) // 2])
    train = [fact for fact in facts if fact.group in train_groups]
    held_out = [fact for fact in facts if fact.group not in train_groups]
    return train, held_out


def ask(fact: Fact, rng: random.Random) -> str:
    """The question about a fact, in one of its wordings."""
    question = rng.choice(QUESTIONS[fact.relation][fact.lang]).format(s=fact.subject)
    return question[0].upper() + question[1:]


def write_rows(name: str, rows: list[dict], rng: random.Random) -> None:
    rng.shuffle(rows)
    lines = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
    (SAMPLES / f"{name}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    print(f"{name}.json: {len(rows)} rows")


def write_questions(seed: int = SEED) -> None:
    """Write a question per fact in the columns of alpaca, for both halves, and the held-out half as prose to complete."""
    rng = random.Random(seed)
    for name, facts in zip(("facts_train", "facts_test"), split_groups(read_facts()), strict=True):
        rows = [{"instruction": ask(fact, rng), "input": "", "output": fact.answer,
                 "relation": fact.relation, "language": fact.lang} for fact in facts]  # fmt: skip
        write_rows(name, rows, rng)
    prose = []
    for fact in facts:
        halves = [
            wording.format(s=fact.subject, a="|").split("|")
            for wording in STATEMENTS[fact.relation][fact.lang]
            if "{aa}" not in wording
        ]
        prompt = halves[0][0]  # the plain statement; others may begin alike and end otherwise
        rests = sorted({rest for start, rest in halves if start == prompt})
        prose.append({"prompt": prompt.rstrip(), "answer": fact.answer, "rests": rests,
                      "relation": fact.relation, "language": fact.lang})  # fmt: skip
    write_rows("facts_prose", prose, rng)


if __name__ == "__main__":
    write_questions()
