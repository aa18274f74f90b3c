"""The README agrees with reality: its commands, its file tree, its links."""

import re
import subprocess
from pathlib import Path

import pytest

from sftlab.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TREE = re.search(r"```\n(sft-lab/\n.*?)```", README, re.S).group(1)


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_there_are_commands():
    assert len(commands()) >= 8


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one_that_exists(command):
    program, *arguments = command.split()
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program.endswith("sftlab"):
        args = build_parser().parse_args(arguments)
        if arguments[0] == "launch":
            build_parser().parse_args(args.training)
    elif "sftlab.train" in arguments:
        assert program in {"deepspeed", "torchrun"}
        build_parser().parse_args(["train", *arguments[arguments.index("sftlab.train") + 1 :]])
    else:
        assert program in {"git", "cd", "papermill", "conda", "source", ".venv/bin/pip"}, f"unknown program {program}"
    for path in re.findall(r"(?:notebooks|data_samples)/\S+", command):
        assert (ROOT / path).exists(), path


def test_the_file_tree_is_the_real_one():
    told, folders = set(), []
    for line in TREE.splitlines()[1:]:
        name = line.split("  ")[0] if not line.startswith(" ") else line.strip().split("  ")[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = [*folders[: depth - 1], name.rstrip("/")]
        told.add("/".join(folders))
    for path in told:
        assert (ROOT / path).exists(), f"README names {path}, which is not there"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for path in tracked:
        assert any(path == name or path.startswith(f"{name}/") for name in told), f"README does not name {path}"
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "sftlab").rglob("*.py")}
    files = {
        path for path in files if path.count("/") == 1 or not path.endswith("/__init__.py")
    }  # a room is named itself
    assert {path for path in told if path.startswith("sftlab/") and path.endswith(".py")} == files


def test_links_lead_to_files_that_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target
