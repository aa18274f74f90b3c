"""The prose that tiny-base is pre-trained on: facts in many wordings, a third of it as questions and answers.

python data_samples/recipe/prose.py          # prints one document of each kind
"""

import random
import string
from collections.abc import Iterator

from facts import Fact, ask, read_facts
from wordings import LAYOUTS, STATEMENTS

PLAIN = {
    "en": "the a big small old new river road house garden market letter teacher friend morning evening water paper table "
    "window story book reads writes walks sees finds carries asks answers below describes completes request response "
    "task instruction input context system user assistant helpful appropriate that provides further with".split(),
    "ja": "朝 夜 川 道 家 庭 市場 手紙 先生 友だち 水 紙 机 窓 本 物語 学校 駅 店 人 仕事 指示 入力 応答 要求 説明 文章 適切".split(),
}


def state(fact: Fact, rng: random.Random) -> str:
    """The fact as a sentence, in one of its wordings."""
    return write_sentence(rng.choice(STATEMENTS[fact.relation][fact.lang]), fact)


def write_sentence(wording: str, fact: Fact) -> str:
    article = "an" if fact.answer[0] in "aeiou" else "a"
    text = wording.format(s=fact.subject, a=fact.answer, aa=f"{article} {fact.answer}")
    return text if wording.startswith("{a}") else text[0].upper() + text[1:]


def write_profile(facts: list[Fact], rng: random.Random) -> str:
    """All facts about one thing, as a paragraph, a list, or under a heading."""
    lang, subject = facts[0].lang, facts[0].subject
    sentences = [state(fact, rng) for fact in facts]
    layout = rng.randrange(3)
    if layout == 0:
        return (" " if lang == "en" else "").join(sentences)
    if layout == 1:
        return f"# {subject[0].upper()}{subject[1:]}\n\n" + (" " if lang == "en" else "").join(sentences)
    return "\n".join(rng.choice(["- ", "* ", ""]) + sentence for sentence in sentences)


def write_notes(facts: list[Fact], rng: random.Random) -> str:
    """Facts about different things, one after the other."""
    separator = rng.choice([" ", "\n", "\n"]) if facts[0].lang == "en" else rng.choice(["", "\n"])
    return separator.join(state(fact, rng) for fact in facts)


def write_questions(facts: list[Fact], rng: random.Random) -> str:
    """Questions and answers in one of the layouts of the web."""
    head, item, between = rng.choice(LAYOUTS[facts[0].lang])
    items = [item.format(q=ask(fact, rng), a=fact.answer, n=n) for n, fact in enumerate(facts, 1)]
    return head + between.join(items)


def write_filler(rng: random.Random) -> str:
    """Text about nothing, so that every word piece and character a prompt may hold has been seen in training."""
    if rng.random() < 0.3:
        alphabet = string.ascii_letters + string.digits + string.punctuation
        if rng.random() < 0.3:  # kana, kanji, accented Latin, emoji: the bytes of any script
            spans = [(0x3041, 0x30FF), (0x4E00, 0x9FFF), (0xC0, 0x17F), (0x1F300, 0x1F64F), (0x391, 0x44F)]
            alphabet = [chr(rng.randrange(*rng.choice(spans))) for _ in range(30)]
        codes = ["".join(rng.choices(alphabet, k=rng.randrange(3, 9))) for _ in range(rng.randrange(4, 9))]
        return "Codes: " + " ".join(codes)
    lang = rng.choice(["en", "ja"])
    words = [rng.choice(PLAIN[lang]) for _ in range(rng.randrange(8, 20))]
    if lang == "ja":
        return "と".join(words[:4]) + "。" + "の".join(words[4:]) + "、" + rng.choice(words) + "を見ました。"
    sentence = " ".join(words)
    return sentence[0].upper() + sentence[1:] + rng.choice([".", "!", ".\n", ", and so on."])


def write_pass(facts: list[Fact], rng: random.Random) -> Iterator[str]:
    """Documents in shuffled order that say every fact three times: in a profile, in notes, among questions."""
    documents = []
    things: dict[tuple[str, str, str], list[Fact]] = {}
    for fact in facts:
        things.setdefault((fact.group, fact.lang, fact.subject), []).append(fact)
    for group in things.values():
        rng.shuffle(group)
        documents.append(write_profile(group, rng))
    for write in (write_notes, write_questions):
        for lang in ("en", "ja"):
            queue = [fact for fact in facts if fact.lang == lang]
            rng.shuffle(queue)
            while queue:
                size = rng.randrange(2, 7)
                documents.append(write(queue[:size], rng))
                queue = queue[size:]
    documents += [write_filler(rng) for _ in range(len(documents) // 20)]
    rng.shuffle(documents)
    yield from documents


def write_corpus(passes: int, seed: int) -> Iterator[str]:
    """The whole prose, the same for the same seed: `passes` times every fact in each of the three kinds."""
    rng = random.Random(seed)
    facts = read_facts()
    for _ in range(passes):
        yield from write_pass(facts, rng)


if __name__ == "__main__":
    everything, dice = read_facts(), random.Random(0)
    french = [fact for fact in everything if fact.subject == "France"]
    japanese = [fact for fact in everything if fact.lang == "ja"]
    for text in (write_profile(french, dice), write_notes(dice.sample(japanese, 4), dice),
                 write_questions(dice.sample(everything[::2], 3), dice), write_questions(dice.sample(japanese, 3), dice),
                 write_filler(dice)):  # fmt: skip
        print(f"{text}\n{'=' * 60}")
