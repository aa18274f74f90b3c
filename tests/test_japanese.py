"""The Japanese edition: every message is translated, in good form; its files are what the sources and catalogues make; it runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftlab import course, language
from sftlab.course import exercises, headless, stored

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))
import make_ja  # noqa: E402

SOURCES = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in SOURCES]
EDITION = ROOT / "notebooks" / "ja"


@pytest.fixture(scope="module")
def catalogues() -> dict:
    return make_ja.update_catalogues()


def sources(path: Path, kind: str) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.mark.parametrize("name", ["common", *NAMES])
def test_every_message_is_translated_in_good_form(name, catalogues):
    kept = (EDITION / "po" / f"{name}.po").read_text(encoding="utf-8")
    assert kept == str(catalogues[name]) + "\n", "the sources have changed: run make ja"
    assert [entry.msgid for entry in make_ja.list_open(catalogues[name])] == []
    terms = make_ja.read_terms()
    assert len(terms) > 20
    assert [(entry.msgid, faults) for entry in catalogues[name] if (faults := make_ja.find_faults(entry, terms))] == []


def test_the_files_are_those_that_make_ja_writes(catalogues):
    built = make_ja.build(catalogues)
    assert sorted(built) == sorted([*EDITION.glob("*.ipynb"), *(EDITION / "figures").glob("*.svg")])
    for path, text in built.items():
        assert make_ja.drop_pictures(path.read_text(encoding="utf-8")) == make_ja.drop_pictures(text), (
            f"{path}: make ja"
        )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_has_the_code_of_its_source_and_leads_to_japanese_pages(name):
    english, japanese = ROOT / "notebooks" / f"{name}.ipynb", EDITION / f"{name}.ipynb"
    code, own = sources(english, "code"), sources(japanese, "code")
    first = next(number for number, text in enumerate(code) if text.startswith("profile: str"))
    assert [re.sub("  # .*", "", code.pop(first))] == [re.sub("  # .*", "", own.pop(first))] and code == own
    assert stored.find_faults(japanese) == []
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", "\n".join(sources(japanese, "markdown")))
    assert f"../{name}.ipynb" in links and f"ja/{name}.ipynb" in "\n".join(sources(english, "markdown"))
    for link in links:
        assert link.startswith("https://") or (EDITION / link).exists(), link
        assert link == f"../{name}.ipynb" or not re.match(r"\.\./[^.]*\.ipynb|\.\./\.\./README\.md", link)


@pytest.mark.parametrize(
    "changed, kept",
    [("A sentence, now another.", "fuzzy"), ("A sentence.", "done"), ("Something else entirely", "open")],
)
def test_a_changed_message_is_fuzzy_until_somebody_looked(tmp_path, changed, kept):
    first = make_ja.update_catalogue(tmp_path / "a.po", {"A sentence.": make_ja.PROSE})
    first[0].msgstr = "文。"
    first.save(str(tmp_path / "a.po"))
    entry = make_ja.update_catalogue(tmp_path / "a.po", {changed: make_ja.PROSE})[0]
    assert {"fuzzy": entry.fuzzy, "done": entry.translated(), "open": not entry.msgstr}[kept]
    assert bool(make_ja.list_open([entry])) == (kept != "done")


@pytest.mark.parametrize(
    "text",
    ["Use `a` and **b**.\nSo.", "# Head\n\n- one\n  two\n- three\n\n| a | b |\n|---|---|\n| c | d |", "![alt](figures/a.svg)",
     "```python\ncode = 1  # stays\n```", "<details><summary>Answers</summary>\n\n1. yes\n   it is\n\n</details>", "$$\nx\n$$"],
)  # fmt: skip
def test_prose_without_translation_stays_as_it_is(text):
    def fold(text):
        return re.sub(r"\s+", " ", text)

    found = []
    assert fold(make_ja.replace_prose(text, lambda one: found.append(one) or one)) == fold(text)
    assert all("code" not in one and "$" not in one for one in found)


def test_texts_put_together_are_translated_part_by_part():
    messages = language.Messages({"rank {rank} is best at {rate}": "ランク {rank} の最良は {rate}", "high": "高い値",
                                  "{x} s over {link}": "{link} で {x} 秒", "In all: {parts}.": "合計：{parts}。"})  # fmt: skip
    assert messages.translate("rank 4 is best at high") == "ランク 4 の最良は 高い値"
    assert (
        messages.translate_parts("rank 4 is best at 1; rank 8 is best at 2.")
        == "ランク 4 の最良は 1; ランク 8 の最良は 2."
    )
    assert messages.translate_parts("In all: 1 s over a; 2 s over b.") == "合計：a で 1 秒; b で 2 秒。"
    assert messages.translate("unknown") == "unknown"


def test_exercises_and_tables_speak_the_language_of_the_folder(monkeypatch, capsys):
    monkeypatch.setattr(language, "chosen", language.chosen)  # English again at the end
    for folder, japanese in ((EDITION, True), (EDITION.parent, False)):
        monkeypatch.chdir(folder)
        assert language.choose("03_formats_and_masks") == japanese
        _, words = exercises.judge("03.1", [-100, -100, -100, 24, 25, -100], {})
        course.exercise("03.1")
        table = course.show_table(("tokens", "BOS tokens"), [("1", "2")]).data
        for text in (words, capsys.readouterr().out, table):
            assert bool(re.search("[ぁ-んァ-ヶ一-龠]{2}", text)) == japanese, text


COMMIT = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip() or "0"


IN_TURN = [NAMES[(int(COMMIT, 16) + number) % len(NAMES)] for number in range(3)]  # each commit takes others


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in IN_TURN)) for name in NAMES]
)
def test_a_notebook_runs_as_the_english_one_does(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SFTLAB_SOLUTIONS", "1")
    [found] = headless.run_notebooks([EDITION / f"{name}.ipynb"], {}, tmp_path / "out", "smoke")
    assert found["status"] == "completed", found["error"]
    assert '<html lang="ja">' in (tmp_path / "out" / f"{name}.html").read_text(encoding="utf-8")
