"""Python code that a model's folder or repository brings along: refused unless asked for, and then told.

Such code runs with the rights of the user, so the lab never runs it, and never asks in between, without
--trust-remote-code.

    python -c "from sftlab.models import remote_code; help(remote_code.guarded)"
"""

import contextlib
import functools
import sys
from pathlib import Path

from sftlab.errors import UserError


@contextlib.contextmanager
def guarded(name: str, path: str, trusted: bool):
    """Around the loading of anything of a model: a refusal is said with what to do, and code that will run is told once.

    name: as the user calls the model; path: its folder or Hub id; trusted: --trust-remote-code. Raises UserError.
    """
    if trusted:
        tell(name, path)
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise UserError(
            f"model {name}: it brings Python code of its own, which could do anything here that you may do. Read it in {path}; only if "
            "you trust who wrote it, add --trust-remote-code."
        ) from None


@functools.cache
def tell(name: str, path: str) -> None:
    """Say on standard error which classes will come from the model's own code; nothing where it has none."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    found = {}
    with contextlib.suppress(OSError, ValueError):  # what is missing is told by the loading itself
        if not (Path(path) / "adapter_config.json").is_file():
            found |= PreTrainedConfig.get_config_dict(path)[0].get("auto_map") or {}
    with contextlib.suppress(OSError, ValueError):
        found |= dict(get_tokenizer_config(path)).get("auto_map") or {}
    if found:
        classes = sorted(
            {str(part) for value in found.values() for part in (value if isinstance(value, list) else [value]) if part}
        )
        print(
            f"warning: model {name} runs Python code of its own here, as asked for: {', '.join(classes)}",
            file=sys.stderr,
        )
