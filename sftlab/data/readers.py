"""Files into rows: JSON, JSON Lines, CSV and Parquet, in UTF-8, UTF-16, CP932 (Shift_JIS) or EUC-JP.

python -c "from sftlab.data import readers; print(readers.read_files(['data_samples/raw/quiz.json'], 'json')[0])"
"""

import csv
import io
import json
import re
from pathlib import Path

from sftlab.errors import UserError

OLD_ENCODINGS = {"cp932": "CP932 (Shift_JIS)", "euc_jp": "EUC-JP"}
SUFFIXES = {"json": (".json",), "jsonl": (".jsonl", ".ndjson"), "csv": (".csv",), "parquet": (".parquet",)}


class BadRow(Exception):
    """Why a row is dropped. A reader puts one in the place of a line that is no row, with its `cells`."""

    cells: list[str]


def require_rows(kept: list, dropped: dict[str, str], name: str) -> None:
    """Raises UserError where no row is left, with the commonest reason first."""
    if kept:
        return
    reasons = "; ".join(group_reasons(dropped)) or "there is none"
    raise UserError(f"{name}: every row was dropped ({reasons}); nothing is left to learn from.")


def group_reasons(dropped: dict[str, str]) -> list[str]:
    """Reasons for dropped rows, the commonest first: each with its number of rows and an example."""
    groups = {}
    for place, why in dropped.items():
        groups.setdefault(re.sub(r"\d[\d,.%]*|\".*\"", "N", why), []).append(f"{place}: {why}")
    sizes = [(len(same), same[0]) for same in sorted(groups.values(), key=len, reverse=True)]
    return [f"{count} rows, as {example}" if count > 1 else example for count, example in sizes]


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
    """A file's text. UTF-8 with or without BOM, UTF-16 with BOM; CP932 and EUC-JP with kana are recognised and reported."""
    raw = path.read_bytes()
    if not raw.strip():
        raise UserError(f"{path}: the file is empty; it must hold rows.")
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        # EUC-JP may pass for CP932, and is then full of half-width katakana; both are told by the kana in them
        decoded = {name: raw.decode(name, errors="replace") for name in OLD_ENCODINGS}
        fits = {name: text for name, text in decoded.items() if "\ufffd" not in text and re.search("[ぁ-ヿ]", text)}
        if not fits or b"\0" in raw:
            byte = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
            raise UserError(f"{path}: not UTF-8 ({byte}), nor CP932 or EUC-JP; save it as UTF-8.") from None
        name = min(fits, key=lambda name: len(re.findall("[｡-ﾟ]", fits[name])))
        text = fits[name]
        print(f"{path}: read as {OLD_ENCODINGS[name]}; saving it as UTF-8 is safer")
    if "\0" in text:
        raise UserError(f"{path}: holds null bytes at offset {raw.index(0)}: it is no text file; export it as text.")
    return text


def parse_json(text: str):
    """A JSON value. Raises JSONDecodeError, also for what Python's reader refuses in other ways, and what `build_object` does."""
    try:
        return json.loads(text, object_pairs_hook=build_object)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise json.JSONDecodeError(f"{error}"[:80], text, 0) from None


def parse_cell(text: str, name: str):
    """JSON in a text of a row. Raises BadRow for what is none."""
    try:
        return parse_json(text)
    except (json.JSONDecodeError, BadRow) as error:
        why = getattr(error, "msg", error)
        raise BadRow(f"{name} is {json.dumps(text, ensure_ascii=False)[:40]}, which is no JSON ({why})") from None


def build_object(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON. Raises BadRow where a key stands there twice: which value is meant is anyone's guess."""
    found = {}
    for name, value in pairs:
        if name in found:
            raise BadRow(f"the key {name!r} stands there twice")
        found[name] = value
    return found


def read_json(path: str | Path) -> list:
    """The list in a JSON file: an array, or an object that holds one list. Raises UserError with line and column."""
    path = find_files(Path(path), "json")[0]
    try:
        content = parse_json(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            print(f"{path}: an object on each line, read as JSON Lines")
            return read_jsonl(path)
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{path}: {place}: not JSON ({error.msg}); fix it there.") from None
    except BadRow as fault:
        raise UserError(f"{path}: not JSON ({fault} in an object); keep one of them.") from None
    if isinstance(content, dict) and len(lists := [one for one in content.values() if isinstance(one, list)]) == 1:
        content = lists[0]
    if not isinstance(content, list):
        found = json.dumps(content)[:40]
        raise UserError(f"{path}: holds {found}, not a list; put the rows in one array: [{{...}}, {{...}}].")
    if not content:
        raise UserError(f"{path}: the array has no rows; add at least two.")
    return content


def read_jsonl(path: Path) -> list:
    """One JSON value per line, or a BadRow; empty lines are passed over. Raises UserError with the line's number."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except BadRow as fault:
            fault.cells = [line]
            rows.append(fault)
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
    first = text.splitlines()[0]
    if first.lower().startswith("sep=") and len(first) == 5:
        delimiter, text = first[4], text[len(first) :].lstrip("\r\n")
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
