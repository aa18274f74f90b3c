"""Files that are whole or not there: written aside, then renamed.

python -c "from pathlib import Path; from sftlab import files; files.write_json(Path('a.json'), {'x': 1})"
"""

import json
import os
import platform
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write beside the file, then rename; the folder is made. An interrupted writer leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")  # another process may write it, too
    try:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a character becomes its escape
        os.replace(aside, path)
    finally:  # the disk may be full
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write an object as indented UTF-8 JSON; numbers of numpy and torch become plain ones."""
    write_text(path, json.dumps(content, ensure_ascii=False, indent=2, default=float) + "\n")


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; empty if there is no such file or it can't be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_existing(place: Path) -> Path:
    """The place, or the nearest folder above it that is there."""
    place = place.absolute()
    return next(folder for folder in (place, *place.parents) if folder.exists())


ROOT = Path(__file__).resolve().parent.parent
