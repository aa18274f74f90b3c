"""Files into rows: JSON, JSON Lines, CSV and Parquet, in UTF-8 or an old Japanese encoding.

python -c "from sftlab.data import readers; print(readers.read_files(['data_samples/raw/quiz.json'], 'json')[0])"
"""

import contextlib
import csv
import io
import json
import re
from pathlib import Path

from sftlab.errors import UserError

SUFFIXES = {"json": (".json",), "jsonl": (".jsonl", ".ndjson"), "csv": (".csv",), "parquet": (".parquet",)}
OLD_ENCODINGS = {"cp932": "CP932 (Shift_JIS)", "euc_jp": "EUC-JP"}
HALF_WIDTH = range(0xFF61, 0xFFA0)  # half-width katakana: what EUC-JP looks like when it is read as CP932


class BadRow(Exception):
    """Why a row is dropped. A reader puts one in the place of a line that is no row, with its `cells`."""

    cells: list[str]


def read_files(paths: list[str | Path], kind: str) -> list[tuple[str, object]]:
    """Rows of files of one kind, each with its place in words: ("a.csv: row 3", row). A folder stands for its files.

    Rows come as they are, in the order of the files, or as a BadRow. Raises UserError with file, place and the fix where
    a file can't be read at all.
    """
    found = list({file.resolve(): file for path in paths for file in find_files(Path(path), kind)}.values())
    rows = []
    for path in found:
        name = f"{path}: " if len(found) > 1 else ""
        rows += [(f"{name}row {number}", row) for number, row in enumerate(READERS[kind](path), 1)]
    return rows


def find_files(path: Path, kind: str) -> list[Path]:
    """The path itself, or the files of this kind in the folder, sorted."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such file.")
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES[kind])
    if not found:
        raise UserError(f"{path}: the folder holds no {' or '.join(SUFFIXES[kind])} file.")
    return found


def read_text(path: Path) -> str:
    """A file's text. UTF-8 with or without BOM, UTF-16 with BOM; CP932 and EUC-JP are recognised and reported."""
    raw = path.read_bytes()
    if not raw.strip():
        raise UserError(f"{path}: the file is empty; it must hold rows.")
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        text = decode_japanese(path, raw, error)
    if "\0" in text:
        raise UserError(f"{path}: holds null bytes at offset {raw.index(0)}: it is no text file; export it as text.")
    return text


def decode_japanese(path: Path, raw: bytes, failure: UnicodeDecodeError) -> str:
    """The text in the old Japanese encoding that fits; of two that fit, the one without half-width katakana."""
    fits = {}
    for encoding in OLD_ENCODINGS:
        with contextlib.suppress(UnicodeDecodeError):
            text = raw.decode(encoding)
            if any("\u3041" <= letter <= "\u30ff" for letter in text):
                fits[encoding] = sum(ord(letter) in HALF_WIDTH for letter in text), text
    if b"\0" in raw or not fits:
        byte = f"byte 0x{raw[failure.start]:02x} at offset {failure.start}"
        raise UserError(f"{path}: not UTF-8 ({byte}), nor CP932 or EUC-JP; save it as UTF-8.")
    best = min(fits, key=fits.get)
    print(f"{path}: read as {OLD_ENCODINGS[best]}; saving it as UTF-8 is safer")
    return fits[best][1]


def parse_json(text: str):
    """A JSON value, with a BadRow for an object that has a key twice. Raises JSONDecodeError, also for what Python's
    reader refuses in other ways.
    """
    try:
        return json.loads(text, object_pairs_hook=build_object)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError):
        raise json.JSONDecodeError("nested too deeply, or a number too long", text, 0) from None


def build_object(pairs: list[tuple[str, object]]) -> object:
    """An object of JSON. Where a key stands there twice, which value is meant is anyone's guess."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    names = [name for name, _ in pairs]
    fault = BadRow(f"the key {next(name for name in found if names.count(name) > 1)!r} stands there twice")
    fault.cells = [f"{name}: {value}" for name, value in pairs]
    return fault


def find_fault(value: object) -> BadRow | None:
    """The first BadRow inside a value."""
    if isinstance(value, BadRow):
        return value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next(filter(None, map(find_fault, inside)), None)


def read_json(path: str | Path) -> list:
    """The list in a JSON file: an array, or an object that holds one list. Raises UserError with line and column."""
    path = find_files(Path(path), "json")[0]
    fix = "put the rows in one array: [{...}, {...}]."
    try:
        content = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            print(f"{path}: an object on each line, read as JSON Lines")
            return read_jsonl(path)
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not JSON ({error.msg}); fix it there.") from None
    if isinstance(content, BadRow):
        raise UserError(f"{path}: {content}; {fix}")
    if isinstance(content, dict):
        lists = [name for name, value in content.items() if isinstance(value, list)]
        if len(lists) != 1:
            there = f"{len(lists)} lists ({', '.join(lists)})" if lists else "no list"
            raise UserError(f"{path}: holds an object with {there}; {fix}")
        content = content[lists[0]]
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {json.dumps(content)[:40]}, not a list; {fix}")
    if not content:
        raise UserError(f"{path}: the array has no rows; add at least two.")
    return content


def read_jsonl(path: Path) -> list:
    """One JSON value per line; empty lines are passed over. Raises UserError with the line's number."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except json.JSONDecodeError as error:
            hint = " For one array over many lines use --source json." if line.strip() in "[{" else ""
            raise UserError(f"{path}: line {number}: not JSON ({error.msg}); one object per line.{hint}") from None
    return rows


def read_csv(path: Path) -> list:
    """Rows of a CSV file with a header line: dicts of text. Cells in quotes may hold commas and line breaks.

    A row of another width than the header's comes as a BadRow. Raises UserError for a header that names a column twice,
    for no rows, and for a quote that is never closed.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of 128 kB, which a long answer may have
    delimiter, text = find_delimiter(path, read_text(path))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        header = [name.strip() or f"column {number}" for number, name in enumerate(next(lines, []), 1)]
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"{path}: header: column {name!r} stands there twice; rename one of them.")
        for cells in lines:
            if cells and len(cells) != len(header):
                rows.append(BadRow(f"number of cells: {len(cells)}, in the header: {len(header)}"))
                rows[-1].cells = cells
            elif cells:
                rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise UserError(f"{path}: line {lines.line_num}: {error}; check the quotes in the lines before.") from None
    if not rows:
        raise UserError(f"{path}: has a header ({', '.join(header)}) and no rows.")
    return rows


def find_delimiter(path: Path, text: str) -> tuple[str, str]:
    """What separates the cells, and the text without Excel's line that says so; reported where it isn't a comma."""
    text = text.lstrip("\r\n")
    first = re.match(r"[^\r\n]*", text)[0]
    if named := re.fullmatch(r"""(["']?)sep=(["']?)(.)\2\1\3*""", first.strip(" "), re.IGNORECASE):
        delimiter, text = named[3], text[len(first) :].lstrip("\r\n")
    else:
        counts = {mark: len(next(csv.reader([first], delimiter=mark), [])) for mark in ",;\t"}
        delimiter = max(counts, key=counts.get)
    if delimiter != ",":
        print(f"{path}: read with {'tabs' if delimiter == chr(9) else delimiter} between the cells")
    return delimiter, text


def drop_nulls(value: object):
    """A value without the keys that Arrow gives each struct of a column, with null for those that it didn't have."""
    if isinstance(value, dict):
        return {key: drop_nulls(one) for key, one in value.items() if one is not None}
    return [drop_nulls(one) for one in value] if isinstance(value, list) else value


def read_parquet(path: Path) -> list:
    """Rows of a Parquet file as dicts. Raises UserError for a file that is none."""
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, OSError):
        raise UserError(f"{path}: is no Parquet file, or a damaged one; export it again.") from None
    if not rows:
        raise UserError(f"{path}: the table has no rows.")
    return [{name: drop_nulls(value) for name, value in row.items()} for row in rows]


READERS = {"json": read_json, "jsonl": read_jsonl, "csv": read_csv, "parquet": read_parquet}
