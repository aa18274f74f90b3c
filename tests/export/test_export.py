"""Export: merged and adapter folders of many kinds of run load plainly and give the trained model; a fault stops them."""

import errno
from pathlib import Path

import pytest
import torch
from tokenizers.normalizers import NFKC
from transformers import AutoModelForCausalLM, PreTrainedModel

from sftlab import files, machine
from sftlab.config.configs import DataConfig, ExportConfig
from sftlab.data import dataset
from sftlab.errors import UserError
from sftlab.evaluate import scores
from sftlab.export import checks
from sftlab.export import folder as export_folder
from sftlab.models import load
from sftlab.train import run, saved

STEPS = {"max_steps": 3, "batch_size": 8, "learning_rate": 2e-2, "max_length": 128, "eval_samples": 8}
MISTRAL, slow = "Mistral-7B-v0.1", pytest.mark.slow
FAULTS = {"file": "again against saved: the logits are off", "disk": "the disk is full, and nothing was put in place"}
# The run measured its held-out loss in its own precision, of which bfloat16 keeps 8 bits; exports are measured in float32.
ROUNDING = {False: 2e-4, True: 2e-2}
GROWN = [
    ("phi-2", {"bf16": True}),  # a head with a bias, which PEFT forgets beside trained token rows
    (MISTRAL, {"use_4bit": True, "bf16": True}),
    pytest.param("gpt2", {}, marks=slow),  # tied embeddings, Conv1D
    pytest.param(MISTRAL, {"use_dora": True, "use_rslora": True, "lora_alpha": 8}, marks=slow),
]


@pytest.fixture
def make_run(configure):
    """A run of three steps, large enough to change the model a lot: its folder."""

    def make(model_name: str, **options) -> Path:
        config = configure(**STEPS | {"use_lora": True, "model_name": model_name} | options)
        run.train(config)
        return Path(config.output_dir)

    return make


def save_base(name: str, folder: Path, renamed=()) -> str:
    """A base with random weights as a folder of its own, so that it can be quantised, and have a tokenizer of its own."""
    load.load_tokenizer("tiny-base").save_pretrained(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        text = path.read_text(encoding="utf-8")
        for token in renamed:  # those that chatml brings are then new, and the vocabulary grows
            text = text.replace(token, token.replace("im", "no"))
        path.write_text(text, encoding="utf-8")
    torch.manual_seed(1)
    model = load.build_random(name)
    if getattr(model.lm_head, "bias", None) is not None:
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder)
    return str(folder)


def export(run, folder, **options) -> dict:
    return export_folder.export(ExportConfig(run_dir=str(run), output_dir=str(folder), **options))


def check_loss(folder, dataset_path, run, bf16: bool) -> None:
    """The held-out loss of a folder that transformers alone loads is the run's own."""
    rows = dataset.load_prepared(dataset_path)[0]["test"].select(range(STEPS["eval_samples"]))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    sums, counts = scores.measure_rows(model, list(rows), 0, batch_size=1)
    trained = files.read_json(run / "result.json")["metrics"]["eval_loss"]
    assert sums.sum() / counts.sum() == pytest.approx(trained, abs=ROUNDING[bf16])


@pytest.mark.parametrize(("name", "bf16"), [("gpt2", False), ("falcon-7b", True), ("gemma-7b", False)])
def test_every_architecture_merges_to_the_model_that_was_trained(name, bf16, make_run, dataset, tmp_path):
    run = make_run(f"random-tiny:{name}", bf16=bf16)
    facts = export(run, tmp_path / "export", dtype="float32")
    assert facts["checks"]["merged"]["relative"] < 2e-5
    check_loss(tmp_path / "export", dataset, run, bf16)


@pytest.mark.parametrize(("name", "options"), GROWN)
def test_a_vocabulary_that_grew_is_merged_with_its_trained_rows(name, options, make_run, tmp_path):
    base = save_base(f"random-tiny:{name}", tmp_path / "base", ("<|im_start|>", "<|im_end|>"))
    grown = dataset.prepare(DataConfig(model=base, format="chatml", num_samples=64, output_dir=str(tmp_path / "sets")))
    run = make_run(base, dataset_path=str(grown), **options)
    export(run, tmp_path / "export", dtype="float32")
    check_loss(tmp_path / "export", grown, run, "bf16" in options)
    if name == "phi-2":
        with pytest.raises(UserError, match="output layer has a bias"):
            export(run, tmp_path / "adapter", kind="adapter")


@pytest.mark.parametrize(("name", "bits", "bf16"), [(MISTRAL, 4, True), (MISTRAL, 8, False), ("gpt2", 4, False)])
def test_a_quantised_base_is_merged_both_ways_measured(name, bits, bf16, make_run, dataset, tmp_path):
    run = make_run(save_base(f"random-tiny:{name}", tmp_path / "base"), bf16=bf16, **{f"use_{bits}bit": True})
    facts = export(run, tmp_path / "export", dtype="float32")
    ways = facts["checks"]["ways"]
    assert ways["dequantised"]["relative"] <= ways["published"]["relative"]
    assert bits == 8 or ways["dequantised"]["relative"] < 1e-5 and ways["published"]["relative"] > 0.005
    check_loss(tmp_path / "export", dataset, run, bf16)
    card = (tmp_path / "export" / "README.md").read_text(encoding="utf-8")
    assert f"quantized to {bits} bits" in card and "on the published base" in card


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_file_or_disk_puts_nothing_in_place(fault, tuned_run, tmp_path, monkeypatch, sftlab_command):
    """A fault of the merge is in notebook 12."""
    right = PreTrainedModel.save_pretrained

    def save(self, folder, **options):
        if fault == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        self.model.norm.weight.data[0] *= 1.02  # two steps of bfloat16 in one weight of four million
        right(self, folder, **options)
        self.model.norm.weight.data[0] /= 1.02

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    code, _, error = sftlab_command("export", tuned_run, "--output-dir", tmp_path / "out" / "x")
    assert code == 2 and FAULTS[fault] in error and list((tmp_path / "out").iterdir()) == []


def test_an_answer_that_ends_elsewhere_is_a_difference():
    read = [checks.Reading(torch.eye(3), answers) for answers in ([[0, 1], [0]], [[0, 1], [0, 1]])]
    assert checks.require_close("reloaded", read[0], read[0], 0)["answers_differ"] == 0
    with pytest.raises(UserError, match="against saved: 1 of 2 answers differ"):
        checks.require_close("reloaded", *read, 0)


def test_a_template_or_a_token_that_is_lost_is_named(tuned_run):
    kept, lost, other = (load.load_tokenizer(str(tuned_run)) for _ in range(3))
    for name in ("eos_token_id", "chat_template"):
        setattr(lost, name, None)
        with pytest.raises(UserError, match=f"{name} was lost"):
            checks.require_same_tokens(kept, lost)
    other.backend_tokenizer.normalizer = NFKC()
    with pytest.raises(UserError, match="makes other ids of '"):
        checks.require_same_tokens(kept, other)


def test_unfinished_runs_folders_in_use_and_little_memory_are_refused(tuned_run, tmp_path, sftlab_command, monkeypatch):
    code, _, error = sftlab_command("export", tuned_run / "checkpoint-2", "--output-dir", tmp_path / "x")
    assert code == 2 and "is a checkpoint. Name its run" in error and len(error.strip().splitlines()) == 1
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "result.json").write_text('{"status": "interrupted"}')
    with pytest.raises(UserError, match="is interrupted"):
        saved.open_run(tmp_path)
    for options, message in (({}, "exists"), ({"overwrite": True}, "is not an export")):
        with pytest.raises(UserError, match=message):
            export(tuned_run, tmp_path, **options)
    monkeypatch.setattr(machine, "free_memory", lambda gpu: 1e6)
    with pytest.raises(UserError, match="float32, 0.0 GB"):
        export(tuned_run, tmp_path / "x")


def test_a_full_fine_tuning_has_no_adapter_and_is_saved_in_the_dtype(make_run, tmp_path):
    full = make_run("random-tiny:gpt2", use_lora=False)
    with pytest.raises(UserError, match="there is no adapter"):
        export(full, tmp_path / "x", kind="adapter")
    export(full, tmp_path / "export", dtype="float16")
    assert files.read_json(tmp_path / "export" / "config.json")["dtype"] == "float16"
