"""Rows with long answers in one style: a thing introduced in two or three full sentences, for notebooks 04 and 11.

python data_samples/recipe/profiles.py          # writes profiles_train.json and profiles_test.json
"""

import random
from collections import defaultdict

from facts import SEED, Fact, read_facts, split_groups, write_rows

QUESTIONS = {
    "en": ["Tell me about {s}.", "Describe {s} in a few words.", "Introduce {s}.", "What should I know about {s}?"],
    "ja": [
        "{s}について教えてください。",
        "{s}を紹介してください。",
        "{s}とは何ですか。",
        "{s}について簡単に説明してください。",
    ],
}
STYLES = {
    "countries": {
        "en": "{S} is a country in {continent}. Its capital is {capital}. People there speak {language} and pay with the {currency}.",
        "ja": "{S}は{continent}の国です。首都は{capital}です。人々は{language}を話し、{currency}で支払います。",
    },
    "prefectures": {
        "en": "{S} is a prefecture of Japan. It is in the {region} region. Its capital is {prefecture_capital}.",
        "ja": "{S}は日本の都道府県です。{region}にあります。県庁所在地は{prefecture_capital}です。",
    },
    "elements": {
        "en": "{S} is a chemical element. Its symbol is {symbol}. Its atomic number is {number}.",
        "ja": "{S}は元素です。元素記号は{symbol}です。原子番号は{number}です。",
    },
    "animals": {
        "en": "The {s} is an animal. Its class is {class}. Its diet type is {diet}.",
        "ja": "{S}は動物です。分類は{class}です。食性は{diet}です。",
    },
}


def write_profile(facts: list[Fact], rng: random.Random) -> dict:
    """The row of one thing in one language; `facts` keeps what an answer must hold, for a rubric."""
    table, lang, subject = facts[0].group.split("/")[0], facts[0].lang, facts[0].subject
    known = {fact.relation: fact.answer for fact in facts}
    named = f"the {subject}" if table == "animals" and lang == "en" else subject
    output = STYLES[table][lang].format(s=subject, S=subject[0].upper() + subject[1:], **known)
    question = rng.choice(QUESTIONS[lang]).format(s=named)
    return {"instruction": question, "input": "", "output": output, "facts": list(known.values()), "language": lang}


def write_profiles(seed: int = SEED) -> None:
    """Write a row for each thing and language, of the same halves as the questions in facts_train.json and facts_test.json."""
    rng = random.Random(seed)
    for name, facts in zip(("profiles_train", "profiles_test"), split_groups(read_facts()), strict=True):
        things = defaultdict(list)
        for fact in facts:
            if fact.relation != "sum":
                things[fact.group, fact.lang].append(fact)
        write_rows(name, [write_profile(known, rng) for known in things.values()], rng)


if __name__ == "__main__":
    write_profiles()
