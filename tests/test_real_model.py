"""The code to copy in "On a real model" of each notebook runs as it stands, on the same architecture made tiny."""

import json
import re

import pytest
import trl
from transformers import AutoModelForCausalLM

from sftlab.models import load
from tests import families
from tests.test_notebooks import NOTEBOOKS, sources

CHATS = [("What is the capital of Japan?", "Tokyo."), ("富士山の高さは？", "3,776メートルです。")]


def find_code(path) -> str:
    """The Python code of a notebook's section "On a real model"; its blocks are one program."""
    text = "\n".join(sources(json.loads(path.read_text(encoding="utf-8")), "markdown"))
    return "\n".join(re.findall(r"```python\n(.*?)```", text.partition("\n## On a real model\n")[2], re.DOTALL))


@pytest.mark.parametrize("path", [*filter(find_code, NOTEBOOKS)], ids=lambda path: path.stem)
def test_the_code_to_copy_runs(path, tmp_path, monkeypatch):
    """In a folder that holds Qwen/Qwen3-8B, as transformers finds it there, with random weights, and twenty chats."""
    tokenizer = families.make_tokenizer("qwen3", eos="<|im_end|>")
    config = load.build_config("random-tiny:Qwen3-8B")
    config.update({"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id})
    for part in (tokenizer, AutoModelForCausalLM.from_config(config)):
        part.save_pretrained(tmp_path / "Qwen" / "Qwen3-8B")
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in CHATS * 10]
    lines = [json.dumps({"messages": row}, ensure_ascii=False) for row in rows]
    (tmp_path / "my_chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    usual, short = trl.SFTConfig, {"max_steps": 3, "gradient_accumulation_steps": 2, "use_cpu": True}  # as bf16 needs
    monkeypatch.setattr(trl, "SFTConfig", lambda **options: usual(**options | short))
    exec(compile(find_code(path), path.stem, "exec"), {"__name__": "__main__"})
