"""A configuration as YAML is read as strictly as a command line, and comes back the same; the four forms of one agree."""

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from papermill.cli import _resolve_type, papermill
from papermill.translators import PythonTranslator

from sftlab.cli import build_parser
from sftlab.config import text as config_text
from sftlab.config.configs import LaunchConfig, MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import dry_run

FIELDS = TrainConfig.__dataclass_fields__
KNOBS = {"lora_r": 16, "learning_rate": 1e-3, "use_lora": True}  # what a notebook sets itself
HARD = TrainConfig(
    model_name="null", dataset_path="データ/質問 集", output_dir="-runs/it's \"q\": #1, {x}\\n", use_lora=True, use_4bit=True,
    lora_r=8, learning_rate=1e-5, max_steps=-1, bf16=None, use_flash_attention=False, train_new_tokens=False,
    lora_target_modules="q_proj, [v_proj]", deepspeed="zero2", warmup_steps=0.05,
)  # fmt: skip
WRONG = [
    ("lora_r: 8\nlernrate: 1", "options: sftlab train has no option 'lernrate'. Did you mean 'learning_rate'"),
    ("lora_r: eight", "options: lora_r: 'eight' is no int. Write it like 16"),
    ("lora_r: {a: 1}", "options: lora_r: {'a': '1'} is no int"),
    ("lora_r: 8\nseed: 1\nlora-r: 16", "options: lora_r stands there twice"),
]
WRONG += [("- lora_r: 8", "no options in it"), ("lora_r: [", "no YAML"), ("7c", "no preset '7c'")]
WRONG += [("use_4bit: true", "add --use-lora")]
GUIDE = {  # its table: (batch from, to, rank, 8-bit, 4-bit, nodes)
    "7b": (4, 8, 16, False, False, "1-2 nodes"),
    "13b": (2, 4, 16, True, False, "2-4 nodes"),
    "70b": (1, 1, 8, False, True, "8 nodes"),
}
WORDS = st.sampled_from(["-x", "--lora-r", "null", "2e-4", "日本 語", "a'b\"c", "{a: b}", "x # y", "~", "a\nb", ""])
TEXTS = WORDS | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def values_of(field):
    """What an option may be, hard ones among them."""
    low, high = field.metadata["low"], field.metadata["high"] or 1e9
    if field.metadata["choices"] or field.name == "deepspeed":
        return st.sampled_from(field.metadata["choices"] or [None, "zero1", "zero2"])
    if field.type in (int, float):
        return st.integers(int(low), int(high)) if field.type is int else st.floats(low, high)
    return TEXTS if field.type is str else st.sampled_from([True, False] + [None] * (field.type is not bool))


@st.composite
def configurations(draw):
    names = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=8))
    try:
        return TrainConfig(**{name: draw(values_of(FIELDS[name])) for name in names})
    except UserError:
        assume(False)  # options that don't go together


def read_command(text: str) -> TrainConfig:
    args = build_parser().parse_args(shlex.split(text)[1:])
    training = build_parser().parse_args(args.training) if args.name == "launch" else args
    return config_text.build_options(TrainConfig, training)


def check_forms(config: TrainConfig, start: TrainConfig) -> None:
    launch = LaunchConfig(nodes=2, gpus_per_node=8, hostfile="my hosts")
    yaml, mill, train, launcher = (form["text"] for form in config_text.list_forms(config, launch, None, start))
    assert config_text.build(yaml if ":" in yaml else "").hash() == config.hash()
    assert read_command(train).hash() == config.hash() == read_command(launcher).hash()
    assert config_text.build_options(LaunchConfig, build_parser().parse_args(shlex.split(launcher)[1:])) == launch
    found: dict = {}
    exec(PythonTranslator.codify({"options": _resolve_type(shlex.split(mill)[-1])}), found)  # as papermill does
    assert config_text.build(found["options"], **KNOBS).hash() == config.hash()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(config=configurations())
def test_all_four_forms_of_any_configuration_give_it_back(config):
    check_forms(config, TrainConfig(**KNOBS))


@pytest.mark.parametrize("config", [HARD, TrainConfig(), TrainConfig(lora_r=1)], ids=["hard", "defaults", "one"])
def test_a_file_beside_other_flags_gives_it_back(config, tmp_path, monkeypatch):
    check_forms(config, TrainConfig(**KNOBS, weight_decay=0.1))
    monkeypatch.chdir(tmp_path)
    Path("設定 1.yaml").write_text(config_text.to_yaml(config_text.choose(config)), encoding="utf-8")
    assert read_command("sftlab train --config '設定 1.yaml'").hash() == config.hash()
    assert read_command("sftlab launch --gpus-per-node 2 train --config '設定 1.yaml' --seed 7").seed == 7


def test_papermill_has_the_notebook_of_the_form_read_its_command(tmp_path):
    words = shlex.split(config_text.to_papermill(HARD, None, TrainConfig(**KNOBS)))[1:]
    done = CliRunner().invoke(papermill, [words[0], str(tmp_path / "out.ipynb"), *words[2:], "--prepare-only"])
    text = (tmp_path / "out.ipynb").read_text(encoding="utf-8")
    assert done.exit_code == 0 and "options = " in text and "config = config_text.build(" in text


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_wrong_is_told_with_its_name(text, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        config_text.build(text)


def test_values_are_read_as_on_the_command_line(tmp_path):
    text = 'learning_rate: 2e-4\nseed: 010\noutput_dir: 007\nbf16: ~\ndeepspeed:\nmodel_name: "~"\nuse-lora: True'
    config = config_text.build(text, lora_r=4)
    wanted = {"learning_rate": 2e-4, "seed": 10, "output_dir": "007", "bf16": None, "deepspeed": None}
    assert config == TrainConfig(model_name="~", use_lora=True, lora_r=4, **wanted)
    assert config.hash() != TrainConfig().hash()
    path = tmp_path / "bad.yaml"
    path.write_bytes("output_dir: 実行".encode("cp932"))
    with pytest.raises(UserError, match="in UTF-8"):
        config_text.read(path)
    path.write_text('\ufeff{"lora_r": 4}', encoding="utf-8")
    assert config_text.read(path) == {"lora_r": 4} and config_text.read("7b")["lora_r"] == 16


def test_the_presets_are_the_guides():
    found = {}
    for name in GUIDE:
        preset = config_text.read_presets()[name]
        config = TrainConfig(**preset["options"])
        assert config.use_lora and config.batch_size == preset["batches"][0]
        found[name] = (*preset["batches"], config.lora_r, config.use_8bit, config.use_4bit, preset["nodes"])
    assert found == GUIDE
    debug = {"model_name": "gpt2", "num_epochs": 1, "batch_size": 2, "logging_steps": 1, "save_steps": 10}
    assert debug.items() <= config_text.read_presets()["debug"]["options"].items()


@pytest.mark.parametrize("name", config_text.read_presets())
def test_the_largest_batch_fits_the_gpu_with_a_tenth_to_spare(name):
    preset = config_text.read_presets()[name]
    config = TrainConfig(**preset["options"] | {"batch_size": preset["batches"][1]})
    plan = MemoryConfig(device="gpu" if preset["gpu"] else "cpu")
    assert dry_run.estimate(config, plan).total < 0.9e9 * (preset["gpu"] or 2)
