"""The command line: help for every option, one line and exit code 2 for what the user can fix."""

import dataclasses

import pytest

from sftlab import cli

GUIDE = (
    "--model-name --dataset-path --output-dir --num-epochs --batch-size --learning-rate --use-lora --bf16 --lora-r "
    "--gradient-checkpointing --lora-alpha --lora-dropout --lora-target-modules --gradient-accumulation-steps "
    "--use-4bit --use-8bit --logging-steps --save-steps"
).split()
REFUSED = [
    (["prepare", "--source", "json", "--source-path", "none.json"], "none.json: no such file"),
    (["prepare", "--source", "alpca"], "Did you mean 'alpaca'"),
    (["prepare", "--format", "chatlm"], "Did you mean 'chatml'"),
    (["prepare", "--format", "model"], "has no chat template of its own"),
    (["prepare", "--offline", "--test-size", "2"], "between 0.001 and 0.9"),
    (["train", "--learning-rate", "fast"], "'fast' is no float"),
    (["train", "--config", "8b"], "no file and no preset '8b'"),
    (["train", "--config", "7b", "--no-use-lora", "--use-4bit"], "add --use-lora"),
    (["train", "--dataset-path", "nowhere"], "not a data set made by"),
    (["prepare", "--offline", "--model", "owner/none"], "can't be reached"),
    (["evaluate", "nowhere"], "nowhere is not a run folder"),
    (["export", "nowhere"], "nowhere is not a run folder"),
    (["doctor", "nowhere"], "no run folder and no log"),
    (["chat", "tiny-base"], "was not made to chat"),
    (["metrics", "--every", "0"], "between 0.1 and 3600"),
    (["report", "nowhere"], "nowhere: no results of"),
    (["sweep", "none.ipynb", "--grid", "lora_r=4,16"], "none.ipynb: no notebook there"),
    (["train", "--lernrate", "1"], "unrecognized arguments: --lernrate"),
    (["trian"], "invalid choice: 'trian'"),
    (["token", "my-token"], "unrecognized arguments: my-token"),
    (["download"], "name a model, as `sftlab download gpt2`"),
    (["download", "gpt2"], "can't be reached"),
]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_every_option_with_its_meaning_and_an_example(name, sftlab_command):
    code, out, _ = sftlab_command(name, "--help")
    assert code == 0 and f"example:\n  sftlab {name}" in out
    for options in cli.COMMANDS[name].options:
        for field in dataclasses.fields(options):
            if field.metadata["help"]:  # else the command has another flag for it
                assert f"--{field.name.replace('_', '-')}" in out and len(field.metadata["help"]) > 10
    assert name != "train" or all(flag in out for flag in GUIDE)


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, sftlab_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, error = sftlab_command(*arguments)
    assert code == 2 and message in error and "Traceback" not in error
    assert "usage: " in error or len(error.strip().splitlines()) == 1, error  # argparse shows it for unknown arguments
    assert not list(tmp_path.iterdir())


def test_prepare_and_train_as_the_guide_does(sftlab_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, encoding in (("a.csv", "cp932"), ("b.csv", "utf-8")):
        rows = "".join(f"{name}の{number}は？,{number}\n" for number in range(6))
        (tmp_path / name).write_bytes(f"質問,回答\n{rows}".encode(encoding))
    prepare = "prepare --model tiny-base --source csv --source-path a.csv b.csv --columns instruction=質問,output=回答"
    code, out, error = sftlab_command(*prepare.split(), "--format", "llama2", "--num-samples", "8")
    assert code == 0 and "a.csv: read as CP932" in out and "languages: Japanese 100%" in out, error
    assert "[INST]" in out and "⟦" in out and "\x1b" not in out  # the mask of the first row, without colour in a pipe
    train = "train --model-name tiny-base --dataset-path datasets/csv_tiny-base_8 --output-dir out --num-epochs 1"
    more = "--bf16 --batch-size 2 --learning-rate 2e-4 --use-lora --gradient-checkpointing --logging-steps 1 --save-steps 10"
    code, out, error = sftlab_command(*train.split(), *more.split())
    assert code == 0 and "saved out" in out and (tmp_path / "out" / "result.json").is_file(), error
