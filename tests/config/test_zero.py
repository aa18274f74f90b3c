"""DeepSpeed's configurations: found by their names, refused with the reason, and explained key by key."""

import json
import re

import pytest

from sftlab.config import deepspeed as deepspeed_configs
from sftlab.errors import UserError

FILES = sorted(deepspeed_configs.CONFIGS.glob("*.json"))
FAULTS = [("{", "is no JSON"), ("[]", "has no ZeRO options"), ('{"zero_optimization": 3}', "has no ZeRO options")]
FAULTS += [('{"zero_optimization": {"stage": 4}}', "ZeRO stage 4; there are 0, 1, 2 and 3")]
FAULTS += [('{"zero_optimization": {"stage": "auto"}}', "ZeRO stage 'auto'")]


def list_keys(content: dict) -> set[str]:
    """All keys, those of inner objects too."""
    return set(content).union(*(list_keys(value) for value in content.values() if isinstance(value, dict)))


def test_the_readme_explains_every_key_and_no_other():
    text = (deepspeed_configs.CONFIGS / "README.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| `(\w+)` \|", text.split("## Line by line")[1].split("\n## ")[0], re.M))
    assert told == set().union(*(list_keys(json.loads(path.read_text(encoding="utf-8"))) for path in FILES))
    listed = "".join(re.findall(r"^\| `.*?\|", text.split("## ")[0], re.M))
    assert set(deepspeed_configs.list_names()) == set(re.findall(r"`([\w-]+)`", listed))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_what_its_name_says(path):
    content = json.loads(path.read_text(encoding="utf-8"))
    stage = int(match[1]) if (match := re.match(r"zero(\d)", path.stem)) else 2
    assert deepspeed_configs.find_stage(path.stem) == content["zero_optimization"]["stage"] == stage
    assert deepspeed_configs.offloads(path.stem) == path.stem.endswith("-offload")
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert {content[key] for key in batch} == {"auto"}  # what a flag says is said once
    assert content["bf16"] == {"enabled": "auto"}


def test_a_name_an_old_path_and_a_file_of_ones_own(tmp_path):
    for name, stem in {"zero2": "zero2", "zero2.json": "zero2", "configs/ds_config_7b.json": "ds_config_7b"}.items():
        assert deepspeed_configs.find_config(name) == deepspeed_configs.CONFIGS / f"{stem}.json"
    own = tmp_path / "zero2.json"
    own.write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    assert deepspeed_configs.find_stage(str(own)) == 1 and deepspeed_configs.find_stage(None) == 0
    with pytest.raises(UserError, match=r"no file zero-2, .*mean 'zero2'.*There are: ds_config_13b, .*zero3-offload\."):
        deepspeed_configs.find_config("zero-2")


@pytest.mark.parametrize(("text", "message"), FAULTS)
def test_a_file_that_says_nothing_sensible_is_named(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=f"deepspeed: {re.escape(str(path))} .*{re.escape(message)}"):
        deepspeed_configs.find_stage(str(path))
