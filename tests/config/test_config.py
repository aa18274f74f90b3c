"""Options: strings become their declared type or are refused, wrong values name the fix."""

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.config.options import coerce
from sftlab.errors import UserError, near_match

TYPED = [("false", bool, False), ("True", bool, True), ("2e-4", float, 0.0002), (3, float, 3.0), ("1e3", int, 1000)]
TYPED += [("null", str | None, None), ("8", int | None, 8), ("4,16, 64", list, ["4", "16", "64"])]
WRONG = [({"lora_rank": 8}, "no option 'lora_rank'. Did you mean 'lora_r'"), ({"learning_rate": -1}, "between 0 and 1")]
WRONG += [({"batch_size": "0"}, "at least 1"), ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'")]
WRONG += [({"learning_rate": float("nan")}, "learning_rate")]
REFUSED = [("yes", bool), (1, bool), (True, int), (1.5, int), ("many", int), ("nan?", float), (None, int), ("inf", int)]
QLORA = {"use_lora": True, "use_4bit": True}
EXPERTS = {"lora_target_parameters": "mlp.experts.down_proj", "use_lora": True}
CONFLICTS = [
    (QLORA | {"use_8bit": True}, "use_4bit, use_8bit: ", "choose one of them"),
    ({"use_8bit": True}, "use_4bit or use_8bit, no use_lora: ", "add --use-lora"),
    ({"use_dora": True}, "use_rslora, use_dora, ", "add --use-lora"),
    ({"lora_target_parameters": "a", "lora_dropout": 0.0}, ".*lora_target_parameters", "add --use-lora"),
    ({"init_adapter": "a"}, ".*init_adapter: ", "add --use-lora"),
    (EXPERTS, "lora_target_parameters, lora_dropout: ", "add --lora-dropout 0"),
    (EXPERTS | QLORA | {"lora_dropout": 0.0}, "lora_target_parameters, use_dora or use_4bit", "leave one"),
    ({"init_adapter": "a", "use_lora": True, "deepspeed": "zero3"}, "init_adapter, ", "--deepspeed zero2"),
    (QLORA | {"deepspeed": "zero3"}, "use_4bit or use_8bit, deepspeed with ZeRO-3: ", "--deepspeed zero2"),
    ({"use_dora": True, "use_lora": True, "use_8bit": True}, "use_dora, use_8bit", "take --use-4bit"),
    ({"use_dora": True, "use_lora": True, "deepspeed": "zero3"}, "use_dora, deepspeed", "--deepspeed zero2"),
    ({"deepspeed": "zero0.json"}, "deepspeed with ZeRO-0: ", "leave out --deepspeed"),
    ({"deepspeed": "shards.json"}, "deepspeed with ZeRO-3: stage3_gather", "take zero3"),
    ({"packing": True, "use_flash_attention": False}, "packing, no use_flash", "leave out --no-use-flash-attention"),
    ({"resume": True, "overwrite": True}, "resume, overwrite: ", "choose one"),
]


def test_strings_become_the_declared_type_or_are_refused():
    for value, kind, expected in TYPED:
        found = coerce("option", value, kind)
        assert found == expected and type(found) is type(expected)
    for value, kind in REFUSED:
        with pytest.raises(UserError, match=r"^option: "):
            coerce("option", value, kind)


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_configuration_says_what_to_do(values, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.build(**values)


def test_what_was_given_is_never_suggested():
    assert near_match("gtp2", ["gpt2", "tiny-base"]) == " Did you mean 'gpt2'?"
    assert near_match("gpt2", ["gpt2", "gpt"]) == "" == near_match("llama", ["gpt2"])


@pytest.mark.parametrize(("options", "refusal", "fix"), CONFLICTS)
def test_options_that_do_not_go_together_are_refused_with_reason_and_fix(options, refusal, fix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zero0.json").write_text('{"bf16": {"enabled": "auto"}}')
    (tmp_path / "shards.json").write_text('{"zero_optimization": {"stage": 3}}')
    with pytest.raises(UserError, match=f"^{refusal}.*; .*{fix}"):
        TrainConfig(**options)
