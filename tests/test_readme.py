"""The documents agree with reality: README in both languages and docs/, their commands, links, tables and file tree."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from sftlab.cli import build_parser
from sftlab.config.configs import TrainConfig
from sftlab.config.text import build_options

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").glob("*.md"))]
README, JAPANESE = (path.read_text(encoding="utf-8") for path in DOCUMENTS[:2])
NEEDS = re.compile(r"^\| `?cpu`?(?: ?[(（].*?[)）])? \| ([\d.]+) \|", re.M)


def list_commands(text: str) -> list[str]:
    """The commands of a document's bash blocks, without their comments."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in blocks.splitlines() if line.strip() and not line.startswith("#")]


def list_links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text)


def list_anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a document's headings."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = dict.fromkeys(command for path in DOCUMENTS for command in list_commands(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_exists(command):
    program, *arguments = command.split()
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == "sftlab" or "sftlab.train" in arguments:
        assert program in {"sftlab", "torchrun", "deepspeed"}
        if program != "sftlab":
            arguments = ["train", *arguments[arguments.index("sftlab.train") + 1 :]]
        args = build_parser().parse_args(arguments)
        if arguments[0] in ("train", "launch"):
            training = build_parser().parse_args(args.training) if arguments[0] == "launch" else args
            build_options(TrainConfig, training)
    else:
        assert program in {"papermill", "conda", ".venv/bin/pip"}, f"unknown program {program}"
    for path in re.findall(r"(?:notebooks|data_samples)/\S+", command):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for link in list_links(path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not link.startswith("https://"):
            assert target.exists(), link
            assert not anchor or anchor in list_anchors(target), link


def test_both_languages_have_the_same_commands_and_links():
    assert list_commands(README) == list_commands(JAPANESE) and len(list_commands(README)) > 20
    apart = {"README.ja.md", "README.md", "README.md#files"}
    english, japanese = ({link.replace("/ja/", "/") for link in list_links(text)} for text in (README, JAPANESE))
    assert english - apart == japanese - apart
    assert "(README.ja.md)" in README and "(README.md)" in JAPANESE


@pytest.mark.parametrize(
    "text, folder", [(README, "notebooks"), (JAPANESE, "notebooks/ja")], ids=["English", "Japanese"]
)
def test_the_course_is_told_as_its_notebooks_have_it(text, folder):
    found = re.findall(r"^\| \[(.*?)\]\((.*?)\) \|.*\| (\S+) \|$", text, re.M)
    rows = {link: (title, minutes) for title, link, minutes in found}
    for path in sorted((ROOT / folder).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        words = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title = words.splitlines()[0].removeprefix("# ").replace(" · ", " ")
        assert rows.pop(f"{folder}/{path.name}") == (title, NEEDS.search(words)[1])
    assert not rows


def test_the_file_tree_is_the_real_one():
    assert len(README.splitlines()) <= 180
    tree = re.search(r"```\n(notebooks/.*?)```", README, re.S)[1]
    told, folder = set(), ""
    for line in tree.splitlines():
        folder = "" if line[0] != " " else folder
        told.add(folder + line.split()[0].rstrip("/"))
        folder = folder or line.split()[0]
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    named = {path.split("/")[0] for path in tracked if not path.startswith(("README", "LICENSE", "."))}
    named |= {"/".join(path.split("/")[:2]) for path in tracked if path.startswith("sftlab/") and "/__" not in path}
    assert told == named


def test_the_reference_has_every_command_and_option_as_they_are():
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["write_reference"](), "write it again: make docs"
    parser = build_parser()
    commands = {name for members in made["list_commands"](parser).values() for name in members}
    assert made["EXITS"].keys() | made["WRITES"].keys() <= commands
