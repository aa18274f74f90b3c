"""Write docs/reference.md: each command and option, as the parser of `sftlab` holds them. Run it with `make docs`.

python docs/make_reference.py
"""

import argparse
import re
from pathlib import Path

from sftlab.cli import COMMANDS, GROUPS, build_parser

PAGE = Path(__file__).resolve().parent / "reference.md"
START = """# Reference

Every command of `sftlab` and every option. `make docs` writes this page from the command line itself, and a test compares them:
don't edit it. What the commands are for is in [how-it-works.md](how-it-works.md).

An option that is on or off has a `--no-` form, as `--packing` and `--no-packing`; LIST is several values with spaces between.
Options of notebooks, of YAML files (`--config`) and of the form have the same names, with `_` for `-`.
`sftlab COMMAND --help` shows this page's lines in a terminal.

Exit codes of every command: 0 done; 1 an unexpected error; 2 something that you can fix, said in one line; 130 stopped by Ctrl-C.
Where a command has others, they are named with it.
"""
# What the parser doesn't know of a command: further exit codes, and the files that it writes.
EXITS = {
    "train": "128 + the signal's number after a signal: 130 for Ctrl-C, 143 for SIGTERM; a checkpoint is saved first",
    "run": "1 a cell failed, 3 a kernel died, 4 a notebook timed out",
    "sweep": "as `run`, of the worst point; 1 also where a notebook recorded no such number",
    "launch": "how the first process that failed ended",
    "runs": "with `--follow`, 1 if the run did not complete",
    "metrics": "that of the command, or 128 + the number of the signal that ended it",
    "benchmark": "1 where points failed",
}
WRITES = {
    "prepare": "`OUTPUT_DIR/SOURCE_MODEL_N/`: the data set, `report.html`, `sftlab.json`, `dropped.jsonl`",
    "train": "`OUTPUT_DIR/`: the model or adapter with its tokenizer, `checkpoint-N/`, `run.json`, `log.jsonl`, `progress.json`, "
    "`trainer_state.json` and, last, `result.json`",
    "run": "`OUTPUT_DIR/`: `NAME.ipynb`, `NAME.html` and `NAME.json` of each notebook, `index.html`, and `work/` with the notebooks' own files",
    "sweep": "`OUTPUT_DIR/`: `sweep.json`, `sweep.csv`, `sweep.html`, and a folder for each point",
    "launch": "what `train` writes; `OUTPUT_DIR-logs/` with each rank's output; with `--slurm` nothing",
    "evaluate": "`result.json` and `report.html` in the run folder",
    "report": "`benchmark.html` in the folder",
    "metrics": "`OUTPUT_DIR/`: `metrics.jsonl`",
    "benchmark": "`OUTPUT_DIR/`: a JSON file for each point",
    "export": "`exports/RUN-KIND/`, or `--output-dir`: the model, its tokenizer and template, `README.md` (the model card), `export.json`",
    "token": "the token, where huggingface_hub keeps it",
    "download": "the model's files, in huggingface_hub's cache",
}
SHARED = 20  # so many options of `train` in another command are named only


def list_commands(parser: argparse.ArgumentParser) -> dict[str, dict[str, argparse.ArgumentParser]]:
    """The commands by group: group -> name -> parser."""
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {
        group: {name: own for name, own in commands.choices.items() if COMMANDS[name].group == group}
        for group in GROUPS
    }


def describe_option(action: argparse.Action) -> tuple[str, str, str, str]:
    """An option as a row of a table: its name, values, meaning and default."""
    meaning = (action.help or "").replace("%%", "%")
    found = re.search(r" \(default: ([^()]*)\)$", meaning)
    meaning, default = (meaning[: found.start()], found[1]) if found else (meaning, "")
    names = [name for name in action.option_strings if not name.startswith("--no-")]
    values = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar or ""
    if isinstance(action, argparse.BooleanOptionalAction):
        values, default = "on,off", default or ("" if "default:" in meaning else "off")
    cells = (", ".join(f"`{name}`" for name in names) or f"`{values}`", values.strip("{}").replace(",", ", "))
    return *(cell.replace("|", r"\|") for cell in (*cells, meaning)), default


def list_options(command: argparse.ArgumentParser) -> dict[str, list[tuple[str, str, str, str]]]:
    """The options by argparse's groups; --help is left out."""
    groups = {
        group.title: [describe_option(action) for action in group._group_actions if action.dest != "help"]
        for group in command._action_groups
    }
    return {title: rows for title, rows in groups.items() if rows}


def write_command(name: str, command: argparse.ArgumentParser, known: set) -> list[str]:
    """The section of one command. `known`: the options of `train`, which others name only, where they have many of them."""
    lines = [f"### {name}", "", command.description, "", "```bash", command.epilog.split("\n  ", 1)[1], "```", ""]
    groups = list_options(command)
    shared = [row[0] for rows in groups.values() for row in rows if row in known]
    shared = shared if name != "train" and len(shared) >= SHARED else []
    for title, rows in groups.items():
        rows = [row for row in rows if row[0] not in shared]
        if rows:
            lines += [f"| {title} | values | what it does | default |", "|---|---|---|---|"]
            lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    if shared:
        missing = ", ".join(sorted({row[0] for row in known} - set(shared)))
        lines += [f"And the options of [train](#train){', except ' * bool(missing)}{missing}.", ""]
    lines += [f"Exit codes: {EXITS[name]}.", ""] if name in EXITS else []
    return lines + ([f"Writes {WRITES[name]}.", ""] if name in WRITES else [])


def write_reference() -> str:
    """The whole page as text."""
    commands = list_commands(build_parser())
    known = {row for rows in list_options(commands["train"]["train"]).values() for row in rows}
    lines = [START]
    for group, members in commands.items():
        lines += [f"## {group.capitalize()}", ""]
        for name, command in members.items():
            lines += write_command(name, command, known)
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(write_reference(), encoding="utf-8")
    print(f"saved {PAGE}")
