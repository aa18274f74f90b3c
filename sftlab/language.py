"""Texts of the running notebook in its language: table headings, chart titles, exercises, computed sentences.

An edition in another language lies in notebooks/LANGUAGE. Its folder `po` holds gettext catalogues, one for each notebook and
common.po for what all of them show; docs/make_ja.py writes them. A message such as "rank {rank} is best" is a pattern: what
stands in place of the braces is kept, or translated by a message of its own. The prose is translated beforehand.

    cd notebooks/ja && python -c "from sftlab import language as l; l.choose('00_start_here'); print(l.translate('loss'))"
"""

import re
from pathlib import Path

PLACE = re.compile(r"\{(\w+)\}")
PROSE = "prose"  # the comment of a message that stands in the notebook itself


class Pattern:
    """A message with places for values."""

    def __init__(self, message: str):
        self.message, self.literals = message, PLACE.split(message)[::2]
        point = r"(?!\d)" if self.literals[-1].endswith(".") else ""  # the end of a sentence, no decimal point
        self.form = re.compile("(.*?)".join(map(re.escape, self.literals)) + point, re.DOTALL)
        self.is_closed = bool(self.literals[0] and self.literals[-1])  # letters say where it begins and ends in a text

    def match(self, text: str) -> tuple[str, ...] | None:
        """The values in a text that is this message; None if it isn't, or if it is several of the kind."""
        found = self.form.fullmatch(text)
        words = [literal.strip() for literal in self.literals if len(literal.strip()) > 2]
        several = found and any(word in value for word in words for value in found.groups())
        return None if several or not found else found.groups()


class Messages:
    """Translates texts by messages: English -> other language. `used` collects the messages that were found in a text."""

    def __init__(self, messages: dict[str, str]):
        self.messages, self.used = messages, set()
        patterns = [Pattern(message) for message in messages if PLACE.search(message)]
        self.patterns = sorted(patterns, key=lambda pattern: len("".join(pattern.literals)), reverse=True)
        self.sentences = [message for message in messages if not PLACE.search(message) and message.count(" ") > 2]

    def _fill(self, message: str, values: tuple[str, ...]) -> str:
        self.used.add(message)
        known = dict(zip(PLACE.findall(message), map(self.translate_parts, values), strict=False))
        return PLACE.sub(lambda place: known.get(place[1], place[0]), self.messages[message])

    def translate(self, text: str) -> str:
        """The whole text by one message; as it is if there is none."""
        if text in self.messages:
            return self._fill(text, ())
        for pattern in self.patterns:
            if (values := pattern.match(text)) is not None:
                return self._fill(pattern.message, values)
        return text

    def translate_label(self, text: str) -> str:
        """A label of a chart: the whole, or the parts that commas and colons divide."""
        head, mark, tail = text.rpartition(": ")
        if tail in self.messages and head:
            return self.translate_label(head) + mark + self.translate(tail)
        whole = self.translate(text)
        return whole if whole != text else ", ".join(map(self.translate, text.split(", ")))

    def translate_parts(self, text: str) -> str:
        """A text that was put together from several messages, such as sentences one after the other."""
        if (whole := self.translate(text)) != text:
            return whole
        for message in self.sentences:
            if message in text:
                text = text.replace(message, self._fill(message, ()))
        for pattern in self.patterns:
            if pattern.is_closed:
                text = pattern.form.sub(lambda found, own=pattern.message: self._fill(own, found.groups()), text)
        return "; ".join(map(self.translate, text.split("; "))).replace("。 ", "。")


chosen = Messages({})


def choose(notebook: str) -> bool:
    """Take the catalogues of a notebook if the kernel works in the folder of an edition; whether there are any."""
    global chosen
    paths = [Path.cwd() / "po" / f"{name}.po" for name in ("common", notebook)]
    found = {}
    for path in filter(Path.exists, paths):
        import polib

        found |= pair_shown(polib.pofile(str(path)))
    chosen = Messages(found)
    return bool(found)


def pair_shown(catalogue) -> dict[str, str]:
    """The finished messages of a catalogue (polib's) that are shown at run time: English -> translation."""
    return {one.msgid: one.msgstr for one in catalogue if one.translated() and one.comment != PROSE}


def translate(text: str) -> str:
    """The text in the language of the running notebook; as it is if the notebook is English or no message is found."""
    return chosen.translate(text)


def translate_parts(text: str) -> str:
    """The same for a text that was put together from several messages."""
    return chosen.translate_parts(text)
