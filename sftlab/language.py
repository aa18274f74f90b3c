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


class Messages:
    """Translates texts by messages: English -> other language. `used` collects the messages that were found in a text."""

    def __init__(self, messages: dict[str, str]):
        self.messages, self.used = messages, set()
        letters = {message: len(PLACE.sub("", message)) for message in messages if PLACE.search(message)}
        longest_first = sorted(letters, key=letters.get, reverse=True)
        self.sentences = [message for message in messages if message not in letters and message.count(" ") > 2]
        self.patterns = [
            (message, _compile(message, "(.*?)"), _compile(message, r"([^;\s][^;\n]*)")) for message in longest_first
        ]

    def _fill(self, message: str, values: tuple[str, ...]) -> str:
        self.used.add(message)
        known = dict(zip(PLACE.findall(message), map(self.translate_parts, values), strict=True))
        return PLACE.sub(lambda place: known.get(place[1], place[0]), self.messages[message])

    def translate(self, text: str) -> str:
        """The whole text by one message; as it is if there is none."""
        if text in self.messages:
            self.used.add(text)
            return self.messages[text]
        for message, whole, _ in self.patterns:
            if found := whole.fullmatch(text):
                literals = [literal for literal in map(str.strip, PLACE.split(message)[::2]) if len(literal) > 2]
                if not any(
                    literal in value for literal in literals for value in found.groups()
                ):  # else there are several
                    return self._fill(message, found.groups())
        return text

    def translate_parts(self, text: str) -> str:
        """A text that was put together from several messages, such as sentences one after the other."""
        if (whole := self.translate(text)) != text:
            return whole
        for message in self.sentences:
            if message in text:
                self.used.add(message)
                text = text.replace(message, self.messages[message])
        for message, _, part in self.patterns:
            text = part.sub(lambda found, message=message: self._fill(message, found.groups()), text)
        return text


def _compile(message: str, edge: str) -> re.Pattern:
    """A message as a pattern; `edge` stands for a place at its beginning or end, which no letter bounds."""
    literals = PLACE.split(message)[::2]
    places = ["(.*?)"] * (len(literals) - 1)
    if not literals[0]:
        places[0] = edge
    if not literals[-1]:
        places[-1] = edge
    parts = [re.escape(literal) + place for literal, place in zip(literals, [*places, ""], strict=True)]
    return re.compile("".join(parts), re.DOTALL)


chosen = Messages({})


def choose(notebook: str) -> bool:
    """Take the catalogues of a notebook if the kernel works in the folder of an edition; whether there are any."""
    global chosen
    chosen = Messages({})
    for name in ("common", notebook):
        path = Path.cwd() / "po" / f"{name}.po"
        if path.exists():
            chosen = Messages(chosen.messages | read_catalogue(path))
    return bool(chosen.messages)


def read_catalogue(path: Path) -> dict[str, str]:
    """The finished messages of a catalogue that are shown at run time: English -> translation."""
    import polib

    return {one.msgid: one.msgstr for one in polib.pofile(str(path)) if one.translated() and one.comment != PROSE}


def translate(text: str) -> str:
    """The text in the language of the running notebook; as it is if the notebook is English or no message is found."""
    return chosen.translate(text)


def translate_label(text: str) -> str:
    """The same for a label of a chart, whose parts commas and colons divide."""
    whole = translate(text)
    for mark in (", ", ": ") if whole == text else ():
        whole = mark.join(map(translate, whole.split(mark)))
    return whole


def translate_parts(text: str) -> str:
    """The same for a text that was put together from several messages."""
    return chosen.translate_parts(text)
