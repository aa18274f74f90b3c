"""Write the Japanese edition, notebooks/ja: each notebook from its English source and the catalogue po/NN_*.po. `make ja` runs it.

The English course is the one source. A message is a paragraph, a list item, a table row, a heading or the alt text of a
picture; a comment of the parameters' cell; a text of an exercise or a drawing; and what the stored outputs show beside print:
headings and cells of tables, titles of charts, computed sentences. Code cells stay as they are, outputs are the source's.
A message whose English changed keeps its translation, marked fuzzy, until somebody has looked at it.

    python docs/make_ja.py          # catalogues, notebooks and drawings; exits with 1 while messages are open
    python docs/make_ja.py --open   # prints the open messages
"""

import argparse
import ast
import base64
import copy
import difflib
import functools
import html
import json
import re
import sys
from pathlib import Path

import nbformat
import numpy
import polib
import yaml
from markdown_it import MarkdownIt
from matplotlib.font_manager import fontManager
from plotly.graph_objects import Figure

from sftlab import files, plots
from sftlab.course import exercises, stored
from sftlab.language import PROSE, Messages, pair_shown

NOTEBOOKS = files.ROOT / "notebooks"
EDITION = NOTEBOOKS / "ja"
LANGUAGE = "ja"
FONT = 'system-ui, "Hiragino Sans", "Noto Sans CJK JP", "Noto Sans JP", "Yu Gothic", "Meiryo", sans-serif'
ITEM = re.compile(r"(\s*(?:[-*]|\d+\.) )(.*)")
BREAK = re.compile(r"\s*$|\s*(```|\||#+ |<|\$\$)")  # a line that ends a paragraph
JAPANESE = "[ぁ-んァ-ヶー一-龠々]"
SWITCH = "[日本語]"  # the link at the top of each English notebook
# Words that sftlab.course.sweep and sftlab.bench.scaling give to tables and charts.
FROM_ROOMS = {"best", "worse", "no measurable difference", "modelled", "no overlap", "full overlap"}
TERMS = "## One word for one term"
CELL = re.compile(r"(?<=>)[^<>]*(?:<code>[^<>]*</code>[^<>]*)*(?=</t[hd]>)")
# A cell whose printed lines are those of an exercise.
EXERCISE = re.compile(r"course\.(exercise|check|predict|compare|progress)\(")


# --- Texts: each function passes the texts of a thing through `say` and returns it otherwise unchanged.


def replace_prose(text: str, say) -> str:
    """A Markdown cell, block by block: code, formulas and HTML stay."""
    lines, out = text.split("\n"), []
    while lines:
        line = lines.pop(0)
        bare = line.strip()
        if bare.startswith("```"):
            out.append(line)
            while lines:
                out.append(lines.pop(0))
                if out[-1].strip() == "```":
                    break
        elif bare.startswith("$$"):
            out.append(line)
            while lines and not out[-1].strip().endswith("$$"):
                out.append(lines.pop(0))
        elif bare.startswith(("<", SWITCH)):
            out.append(re.sub(r"(?<=<summary>)(.*?)(?=</summary>)", lambda found: say(found[1]), line))
        elif bare.startswith("|"):
            out.append(line if set(bare) <= set("|-: ") else say(bare))
        elif found := re.fullmatch(r"(#+ )(.*)", line):
            out.append(found[1] + say(found[2]))
        elif bare:
            mark, first = (found[1], found[2]) if (found := ITEM.fullmatch(line)) else (re.match(r"\s*", line)[0], bare)
            block = [first]
            while lines and not (BREAK.match(lines[0]) or ITEM.match(lines[0])):
                block.append(lines.pop(0).strip())
            whole = " ".join(block)
            picture = re.fullmatch(r"!\[(.*)\](\(\S+\))", whole)
            out.append(f"{mark}![{say(picture[1])}]{picture[2]}" if picture else mark + say(whole))
        else:
            out.append(line)
    return "\n".join(out)


def replace_comments(code: str, say) -> str:
    """The cell of parameters: the comment after each value."""
    return re.sub(r"(?<=  # )(.+)$", lambda found: say(found[1]), code, flags=re.MULTILINE)


def replace_drawing(svg: str, say) -> str:
    """A drawing: its title, its description and each run of text in it."""
    words = re.compile(r"(?<=>)(\s*)([^<>]*[A-Za-z]{2}[^<>]*?)(\s*)(?=</(?:text|tspan|title|desc)>|<tspan)")

    def replace(found) -> str:
        return found[1] + html.escape(say(html.unescape(found[2])), quote=False) + found[3]

    head, style, body = re.split(r"(<style>.*?</style>)", svg, maxsplit=1, flags=re.DOTALL)
    style = style.replace("system-ui, sans-serif", FONT.replace('"', "'"))
    return words.sub(replace, head) + style + words.sub(replace, body)


def replace_outputs(outputs: list, messages: Messages, exercise: Messages | None = None) -> list:
    """Stored outputs: tables, computed sentences, charts, and with `exercise` the printed lines of exercises."""
    outputs = copy.deepcopy(outputs)
    for output in outputs:
        data = output.get("data", {})
        if "<table>" in data.get("text/markdown", ""):
            data["text/markdown"] = CELL.sub(lambda found: replace_cell(found[0], messages), data["text/markdown"])
        elif "text/markdown" in data:
            data["text/markdown"] = messages.translate_parts(data["text/markdown"])
        elif plots.PLOTLY_MIME in data:
            replace_chart(data, messages)
        elif output["output_type"] == "stream" and exercise:
            output["text"] = "\n".join(replace_line(line, exercise) for line in output["text"].split("\n"))
    return outputs


def replace_line(line: str, messages: Messages) -> str:
    """A printed line, if it is one of an exercise: its number and title, or the title of a prediction with what came out."""
    title, colon, rest = line.partition(": ")
    if title in messages.messages:
        return messages.translate(title) + colon + messages.translate_parts(rest)
    own = re.match(r"\w\d\.\d|Your answer: ", line)
    return messages.translate_parts(" · ".join(map(messages.translate, line.split(" · ")))) if own else line


def replace_cell(cell: str, messages: Messages) -> str:
    """A cell of a table as `course.show_table` writes it."""
    text = html.unescape(re.sub("</?code>", "`", cell)).replace("↵", "\n")
    changed = messages.translate(text)
    return cell if changed == text else re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(changed.replace("\n", "↵")))


def replace_chart(data: dict, messages: Messages) -> None:
    """A chart in place: its data, its picture and its words, if any text of it has a translation."""
    figure = Figure(decode_arrays(data[plots.PLOTLY_MIME]))
    changed = plots.translate_labels(figure, messages)
    if changed.to_dict() != figure.to_dict():
        picture = {"data": {"image/png": base64.b64encode(plots.draw_static(changed)).decode()}}
        data |= stored.clean_output(picture)["data"]
        data |= {plots.PLOTLY_MIME: json.loads(changed.to_json()), "text/plain": plots.summarise(changed)}


def decode_arrays(value):
    """A figure's JSON with lists for the arrays that plotly stores as base64."""
    if isinstance(value, dict) and "bdata" in value:
        return numpy.frombuffer(base64.b64decode(value["bdata"]), value["dtype"]).tolist()
    if isinstance(value, dict):
        return {key: decode_arrays(part) for key, part in value.items()}
    return [decode_arrays(part) for part in value] if isinstance(value, list) else value


# --- Messages


def list_code_texts(code: str) -> list[str]:
    """The texts in Python code that a reader could see, an f-string as a pattern with names in its braces."""
    found = []
    nodes = list(ast.walk(parse_cell(code)))
    pieces = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts, names = [], []
            for part in node.values:
                if isinstance(part, ast.Constant):
                    parts.append(part.value)
                else:
                    name = re.sub(r"\W+", "_", ast.unparse(part.value)).strip("_")[:24].strip("_") or "value"
                    names.append(f"{name}_{len(names) + 1}" if name in names or name[0].isdigit() else name)
                    parts.append("{" + names[-1] + "}")
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in pieces:
            found.append(node.value)
    return [text for text in found if has_words(re.sub(r"\{\w+\}", "", text))]


def list_alternatives(code: str) -> list[set[str]]:
    """The texts of which Python code takes one, as in `"better" if gain > 0 else "worse"`."""
    choices = [node for node in ast.walk(parse_cell(code)) if isinstance(node, ast.IfExp)]
    return [
        {text for part in (node.body, node.orelse) for text in list_code_texts(ast.unparse(part))} for node in choices
    ]


def parse_cell(code: str) -> ast.Module:
    """A cell without its magics."""
    return ast.parse("\n".join("pass" if re.match(r"\s*[%!]", line) else line for line in code.splitlines()))


def has_words(text: str) -> bool:
    """Whether there is anything to translate: LoRA and GB have no two small letters in a row, and files' names aren't words."""
    return bool(re.search("[a-z]{2}", text)) and not re.fullmatch(r"--\S+|[\w-]+[./_][\w./{}-]+", text)


class Collector(Messages):
    """Finds which of some texts are shown: every message is its own translation."""

    def __init__(self, texts: list[str]):
        super().__init__({text: text for text in texts})


def list_messages(path: Path, shared: set[str]) -> dict[str, str]:
    """The messages of a notebook: English -> where it stands. `shared` collects those of the lab's own."""
    notebook, found = nbformat.read(path, as_version=4), {}

    def note(where: str):
        def say(text: str) -> str:
            if has_words(text):
                found.setdefault(text, where)
            return text

        return say

    own, alternatives, labels = [], [], list_labels()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            replace_prose(cell.source, note(PROSE))
        else:
            own += list_code_texts(cell.source)
            alternatives += list_alternatives(cell.source)
            if "parameters" in cell.metadata.get("tags", []):
                replace_comments(cell.source, note(PROSE))
    exercises.replace_texts(read_exercises(path), note("exercise"))
    for drawing in list_drawings(path):
        replace_drawing(drawing.read_text(encoding="utf-8"), note("drawing"))
    collector, charted = Collector([*own, *list_phrases()]), Collector([*own, *labels])
    for cell in notebook.cells:
        if cell.cell_type == "code":
            charts = [output for output in cell.outputs if plots.PLOTLY_MIME in output.get("data", {})]
            replace_outputs([output for output in cell.outputs if output not in charts], collector)
            replace_outputs(charts, charted)
    shown = collector.used | (charted.used - labels) | list_known(path)  # what another run has shown stays
    shown |= {text for texts in alternatives if texts & shown for text in texts}
    for text in own:
        if text in shown:
            found.setdefault(text, "output")
            if found[text] == PROSE:
                found[text] = "prose and output"
    shared |= charted.used & labels
    return found


def list_known(path: Path) -> set[str]:
    """The messages of a notebook's catalogue, as it is."""
    catalogue = EDITION / "po" / f"{path.stem}.po"
    return {entry.msgid for entry in polib.pofile(str(catalogue))} if catalogue.exists() else set()


def list_labels() -> set[str]:
    """What sftlab.plots itself writes on charts."""
    code = (files.ROOT / "sftlab" / "plots.py").read_text(encoding="utf-8")
    return {text for text in list_code_texts(code) if "\n" not in text and not re.search(r"\{\w+\}", text)}


@functools.cache
def list_phrases() -> set[str]:
    """What sftlab passes through `translate` itself, and how it writes a score and a verdict."""
    found = set()
    for path in sorted((files.ROOT / "sftlab").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.endswith("translate"):
                found |= set(list_code_texts(ast.unparse(node.args[0]))[:1])  # the rest is what stands in the braces
            elif name.endswith("show_table"):
                found |= set(list_code_texts(ast.unparse(node.args[0])))
    scores = list_code_texts((files.ROOT / "sftlab" / "evaluate" / "scores.py").read_text(encoding="utf-8"))
    return found | FROM_ROOMS | {text for text in scores if text.startswith(("exact match {", "95 % interval {"))}


def read_exercises(path: Path) -> dict:
    found = NOTEBOOKS / "exercises" / f"{path.stem.partition('_')[0]}.yaml"
    return yaml.safe_load(found.read_text(encoding="utf-8")) if found.exists() else {}


def list_drawings(path: Path) -> list[Path]:
    """The drawings of a notebook, by the number in their names; another one may show them, too."""
    return sorted((NOTEBOOKS / "figures").glob(f"{path.stem.partition('_')[0]}_*.svg"))


def update_catalogue(path: Path, messages: dict[str, str]) -> polib.POFile:
    """The catalogue with exactly these messages, in this order; a changed one is fuzzy, with the nearest old translation."""
    old = {entry.msgid: entry for entry in polib.pofile(str(path))} if path.exists() else {}
    new = polib.POFile(wrapwidth=0)
    new.metadata = {"Language": LANGUAGE, "MIME-Version": "1.0", "Content-Type": "text/plain; charset=utf-8",
                    "Content-Transfer-Encoding": "8bit"}  # fmt: skip
    gone = [text for text, entry in old.items() if text not in messages and entry.msgstr]
    for text, where in messages.items():
        entry = old.get(text) or polib.POEntry(msgid=text)  # with what a translator noted
        entry.comment = where
        if text not in old and (near := difflib.get_close_matches(text, gone, 1, 0.6)):
            entry.msgstr, entry.flags, entry.previous_msgid = old[near[0]].msgstr, ["fuzzy"], near[0]
        new.append(entry)
    return new


def list_open(catalogue: polib.POFile) -> list[polib.POEntry]:
    return [entry for entry in catalogue if not entry.translated()]


def find_faults(entry: polib.POEntry, terms: list[tuple[str, str, list[str]]]) -> list[str]:
    """What is wrong with the form of a translation. terms: as `read_terms` returns them."""
    source, text, faults = entry.msgid, entry.msgstr, []
    for what, form in (("place", r"\{\w+\}"), ("code", "`[^`]+`"), ("link", r"\]\([^)]+\)")):
        kept, found = set(re.findall(form, source)), set(re.findall(form, text))
        faults += [f"{what} {one} is missing" for one in sorted(kept - found)]
        faults += [f"{what} {one} is unknown" for one in sorted(found - kept) if what == "place"]
    if source.startswith("|") and source.count("|") != text.count("|"):
        faults.append("another number of table cells")
    plain = re.sub(r"`[^`]*`|\]\([^)]*\)|\{\w+\}", " ", text)
    if found := re.search(f"{JAPANESE}[A-Za-z0-9]|[A-Za-z0-9]{JAPANESE}", plain):
        faults.append(f"no space in {found[0]!r}")
    if found := re.search(r"\d [%％]", plain):
        faults.append(f"a space in {found[0]!r}")
    if found := re.search("[０-９Ａ-Ｚａ-ｚ]", text):
        faults.append(f"full-width {found[0]!r}")
    if has_stars(text) and not has_stars(source):
        faults.append("** that is not bold: punctuation or a space belongs outside of it")
    words = re.sub(r'`[^`]*`|"[^"]*"', "", source)
    for english, wanted, others in terms:
        if re.search(rf"\b{english}s?\b", words, re.IGNORECASE) and wanted not in text:
            faults.append(f"{english}: {wanted}")
        faults += [f"{other}: {wanted}" for other in others if other in text]
    return faults


def has_stars(text: str) -> bool:
    """Whether Markdown shows stars instead of bold text."""
    return "**" in re.sub("<code>.*?</code>", "", MarkdownIt().renderInline(text))


def read_terms() -> list[tuple[str, str, list[str]]]:
    """The glossary's table of one word for one term: English, the Japanese word, words that don't stand for it."""
    page = (files.ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    table = page.partition(TERMS)[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    return [(english, wanted, others.split("、") if others else []) for english, wanted, others in rows[2:]]


# --- The edition


def update_catalogues() -> dict[str, polib.POFile]:
    """All catalogues, brought up to the sources: name -> catalogue; nothing is written."""
    shared, found = set(list_phrases()), {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        found[path.stem] = update_catalogue(EDITION / "po" / f"{path.stem}.po", list_messages(path, shared))
    common = dict.fromkeys(sorted(shared), "shared")
    return {"common": update_catalogue(EDITION / "po" / "common.po", common)} | found


def build(catalogues: dict[str, polib.POFile]) -> dict[Path, str]:
    """Every file of the edition but the catalogues: path -> text."""
    built = {}
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        built[EDITION / path.name] = build_notebook(path, catalogues["common"], catalogues[path.stem])
        prose = pair_messages(catalogues[path.stem])
        for drawing in list_drawings(path):
            text = replace_drawing(drawing.read_text(encoding="utf-8"), lambda text, known=prose: known.get(text, text))
            built[EDITION / "figures" / drawing.name] = text
    return built


def build_notebook(path: Path, common: polib.POFile, own: polib.POFile) -> str:
    """A notebook of the edition as text."""
    prose, messages = pair_messages(own), Messages(pair_shown(common) | pair_shown(own))
    phrases = {text: one for text, one in pair_shown(common).items() if text not in FROM_ROOMS}
    exercise = Messages(phrases | pair_messages(own, "exercise"))

    def say(text: str) -> str:
        return prose.get(text, text)

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = replace_prose(cell.source, say).replace(f"{SWITCH}({LANGUAGE}/", "[English](../")
            cell.source = re.sub(r"(\]\()([^)\s]+)\)", move_link, text)
        else:
            if "parameters" in cell.metadata.get("tags", []):
                cell.source = replace_comments(cell.source, say)
            shown = exercise if EXERCISE.search(cell.source) else None
            cell.outputs = nbformat.from_dict(replace_outputs(cell.outputs, messages, shown))
    notebook.metadata["sftlab"] = {"sources": stored.hash_sources(notebook), "language": LANGUAGE}
    return nbformat.writes(notebook) + "\n"


def pair_messages(catalogue: polib.POFile, kind: str = "") -> dict[str, str]:
    """The finished messages of a catalogue, or those of a kind: English -> Japanese."""
    return {entry.msgid: entry.msgstr for entry in catalogue if entry.translated() and kind in entry.comment}


def move_link(found: re.Match) -> str:
    """A link as it is from the edition's folder, one deeper than the source's."""
    target = found[2]
    if "://" not in target and Path(target.partition("#")[0]).suffix not in ("", ".ipynb", ".svg"):
        target = "../" + re.sub(r"^\.\./README\.md", "../README.ja.md", target)
    return f"{found[1]}{target})"


def drop_pictures(text: str) -> str:
    """A notebook's text without its charts as PNG, which depend on the fonts of the machine."""
    return re.sub(r'"image/png": "[^"]*"', '"image/png": ""', text)


def main() -> int:
    """Write what changed; 0 if no message is open or faulty."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--open", action="store_true", help="print the open messages")
    args = parser.parse_args()
    if not any(font.name in plots.FONTS[1:] for font in fontManager.ttflist):
        print(f"The charts need a Japanese font, one of {', '.join(plots.FONTS[1:])}; make browser installs one.")
        return 1
    catalogues = update_catalogues()
    waiting = {name: entries for name, catalogue in catalogues.items() if (entries := list_open(catalogue))}
    for name, catalogue in catalogues.items():
        files.write_text(EDITION / "po" / f"{name}.po", str(catalogue) + "\n")
    built = build(catalogues)
    for path, text in built.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if drop_pictures(before) != drop_pictures(text):
            files.write_text(path, text)
    for path in {*EDITION.glob("*.ipynb"), *(EDITION / "figures").glob("*.svg")} - built.keys():
        path.unlink()
    for name, entries in waiting.items():
        print(f"{name}: {len(entries)} messages open")
        if args.open:
            print(*(f"  {entry.msgid}" for entry in entries), sep="\n")
    terms, faulty = read_terms(), 0
    for name, catalogue in catalogues.items():
        for entry in (entry for entry in catalogue if entry.translated()):
            if faults := find_faults(entry, terms):
                faulty += 1
                print(f"{name}: {'; '.join(faults)}\n  {entry.msgid}\n  {entry.msgstr}")
    total = sum(map(len, catalogues.values()))
    print(f"{len(built)} files, {total} messages, {sum(map(len, waiting.values()))} open")
    return int(bool(waiting or faulty))


if __name__ == "__main__":
    sys.exit(main())
