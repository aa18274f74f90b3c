"""What the person at the keyboard can fix: raised as UserError anywhere, shown in one line by the commands.

python -c "from sftlab.errors import near_match; print(near_match('lora_rank', ['lora_r', 'seed']))"
"""

import difflib
import errno
import io
import os
import re
import sys
import typing
from collections.abc import Callable

TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")  # a token of the Hugging Face Hub; a whole one has 34 after hf_

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FULL_WORDS = re.compile("PytorchStreamWriter|inline_container|Not enough disk space")  # of errors without a number
PLACES = (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)


class UserError(Exception):
    """Something that the person at the keyboard can fix. The message says what, where and how; exit code 2."""


def refuse_token(value: object, where: str) -> None:
    """Raises UserError, which doesn't show it, for a value that holds something like a token: values are written down."""
    if TOKEN.search(str(value)):
        raise UserError(
            f"{where}: this looks like a token, and would be kept in histories, process lists and outputs. Make it invalid at "
            "huggingface.co/settings/tokens, and give a new one to `sftlab token`, which asks for it."
        )


def near_match(name: str, names: typing.Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of `names`; an empty string if none is close, or the name is one of them."""
    names = list(names)
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" Did you mean {found[0]!r}?" if found and name not in names else ""


def place_error(place: object, why: str, instead: str = "") -> UserError:
    """The error about a file or folder that can't be written. `instead`: what else helps than another --output-dir."""
    name = f"{instead}, or name" if instead else "Name"
    return UserError(f"output_dir: {place} {why}. {name} another --output-dir.")


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that the disk is full: from Python, safetensors, torch or datasets."""
    while error is not None:
        words = str(error)
        codes = {int(number) for number in re.findall(r"\b(?:code:|os error) (\d+)", words)}  # safetensors, in Rust
        if {getattr(error, "errno", None), *codes} & FULL or FULL_WORDS.search(words):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain(error: Exception) -> str | None:
    """What a command says, in a line, of an error that the user can fix; None for any other."""
    if isinstance(error, UserError):
        return str(error)
    if is_full(error):
        return "the disk is full, and nothing was put in place. Make room, or name a folder on another disk."
    if isinstance(error, PLACES) or isinstance(error, OSError) and error.errno in (errno.EROFS, errno.ENAMETOOLONG):
        return f"{error.filename}: {error.strerror}. Name another file or folder."
    return None


def run_guarded(run: Callable[[], int], arguments: list[str]) -> int:
    """Run a command and return its exit code: 0 done, 2 something the user can fix, said in one line, 130 interrupted,
    141 nobody reads on."""
    for stream in (sys.stdout, sys.stderr):  # a log file in a narrow encoding must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for argument in arguments:
            refuse_token(argument, "an argument")
        return run()
    except BrokenPipeError:  # whoever read this has enough, as `head` has
        sys.stdout = open(os.devnull, "w")  # or Python would complain at its end
        return 141
    except KeyboardInterrupt:
        print("sftlab: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (message := explain(error)) is None:
            raise
    rank = os.environ.get("RANK", "0")
    print(f"sftlab: {f'rank {rank}: ' if rank != '0' else ''}{message}", file=sys.stderr)
    return 2
