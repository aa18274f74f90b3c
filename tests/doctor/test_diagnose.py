"""A failed run is understood: every known error by a real message, many of them provoked, and the unknown shown as it is."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from sftlab import files
from sftlab.cli import main
from sftlab.config.configs import TrainConfig
from sftlab.doctor import diagnosis, known_errors
from sftlab.models import load as models_load
from sftlab.runs import background, state
from sftlab.train import run

SAMPLES = yaml.safe_load(Path(__file__).with_name("error_samples.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["row"])
def test_a_real_message_is_found_by_its_row_first(sample):
    found = known_errors.match(f"step 3\n{sample['text']}\n", "error.log")
    assert found and found[0].name == sample["row"], [finding.name for finding in found]
    assert (
        found[0].line > 1
        and found[0].symptom in sample["text"].replace(str(Path.home()), "~")
        or "…" in found[0].symptom
    )


def test_each_row_has_a_sample_and_says_what_to_do():
    rows = known_errors.load_table()
    assert len(rows) >= 30 and len({row.name for row in rows}) == len(rows)
    assert {row.name for row in rows} == {sample["row"] for sample in SAMPLES}
    for row in rows:
        assert row.what and row.cause and row.mend and (row.read is None or row.read.startswith("notebooks/"))


def test_healthy_text_and_prose_about_errors_match_nothing():
    text = "precision: float32\n{'loss': 0.05, 'epoch': 1.0}\n{'loss': 10.0}\nsaved runs/first\nepoch 0.0 loss 1e-05"
    assert known_errors.match(text, "run.log") == []


def sft(rows: list[dict], folder: Path, **options) -> None:
    """TRL's own trainer, one step on a CPU."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", max_steps=1, save_strategy="no",
                     gradient_checkpointing=False, **options)  # fmt: skip
    SFTTrainer(model=models_load.load_model("random-tiny:Llama-2-7b-hf"), args=args, train_dataset=Dataset.from_list(rows),
               processing_class=models_load.load_tokenizer("tiny-base")).train()  # fmt: skip


def load(folder: Path, name: str, content: bytes) -> None:
    from datasets import load_dataset

    (folder / name).write_bytes(content)
    load_dataset(Path(name).suffix[1:].replace("jsonl", "json"), data_files=str(folder / name), cache_dir=str(folder))


def limit(kind: int, value: int, function):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        return function()
    finally:
        resource.setrlimit(kind, before)


def allocate():
    import torch

    torch.empty(10**15)


def take_port():
    import torch

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        torch.distributed.TCPStore("127.0.0.1", taken.getsockname()[1], 2, True)


def save(path: str):
    import torch

    torch.save(torch.ones(10**5), path)


def kill_loader():
    import torch

    list(
        torch.utils.data.DataLoader([1, 2], collate_fn=lambda rows: os.kill(os.getpid(), signal.SIGKILL), num_workers=1)
    )


def adapt(**options):
    from peft import LoraConfig, get_peft_model

    get_peft_model(models_load.load_model("random-tiny:Llama-2-7b-hf"), LoraConfig(task_type="CAUSAL_LM", **options))


def forward(ids: list[list[int]]):
    import torch

    models_load.load_model("random-tiny:Llama-2-7b-hf")(input_ids=torch.tensor(ids))


def cut_weights(folder: Path):
    import shutil

    shutil.copytree(models_load.TINY_BASE, folder / "cut")
    weights = folder / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    models_load.load_model(str(folder / "cut"))


def build_arguments(**options):
    from trl import SFTConfig

    SFTConfig(output_dir="x", **options)


PROVOKED = {
    "missing-column": lambda folder: sft([{"body": "a b c"}] * 4, folder),
    "mask-of-nothing": lambda folder: sft([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4, folder),
    "host-memory": lambda folder: allocate(),
    "disk-full": lambda folder: save("/dev/full"),
    "disk-quota": lambda folder: limit(resource.RLIMIT_FSIZE, 1000, lambda: (folder / "x").write_bytes(b"x" * 9999)),
    "too-many-files": lambda folder: limit(resource.RLIMIT_NOFILE, 60, lambda: [open("/dev/null") for _ in range(99)]),
    "port-in-use": lambda folder: take_port(),
    "loader-died": lambda folder: kill_loader(),
    "broken-json": lambda folder: load(folder, "bad.jsonl", b'{"text": "a"}\n{"text": b}\n'),
    "encoding": lambda folder: load(folder, "cp932.csv", "質問,回答\nあ,い\n".encode("cp932")),
    "empty-file": lambda folder: load(folder, "empty.csv", b""),
    "not-a-saved-set": lambda folder: __import__("datasets").load_from_disk(str(folder)),
    "lora-targets": lambda folder: adapt(target_modules=["c_attn"]),
    "token-out-of-range": lambda folder: forward([[10**6]]),
    "broken-download": cut_weights,
    "unexpected-argument": lambda folder: build_arguments(evaluation_strategy="no"),
    "no-bf16": lambda folder: build_arguments(bf16=True, use_cpu=False),
    "no-module": lambda folder: __import__("nonesuch"),
}  # fmt: skip


@pytest.mark.parametrize("row", PROVOKED)
def test_a_provoked_error_is_named_with_its_place(row, tmp_path, capsys):
    with pytest.raises(Exception) as raised:
        PROVOKED[row](tmp_path)
    log = tmp_path / "error.log"
    log.write_text("step 1\n" + "".join(traceback.format_exception(raised.value)), encoding="utf-8")
    capsys.readouterr()
    assert main(["doctor", str(log), "--json"]) == 1
    [found] = json.loads(capsys.readouterr().out)
    assert found["findings"][0]["name"] == row, found["findings"]
    line = log.read_text(encoding="utf-8").splitlines()[found["findings"][0]["line"] - 1]
    assert found["findings"][0]["symptom"].strip("…")[:40] in line


def config(dataset, folder, **options) -> TrainConfig:
    usual = {"max_steps": 4, "batch_size": 4, "max_length": 128, "bf16": False, "eval_samples": 8, "logging_steps": 1}
    return TrainConfig(dataset_path=str(dataset), output_dir=str(folder), **usual | options)


def fail(config: TrainConfig) -> diagnosis.Diagnosis:
    with pytest.raises(Exception):  # noqa: B017 (whichever: the doctor is asked what it was)
        run.train(config)
    [found] = diagnosis.diagnose(config.output_dir)
    return found


def test_a_loss_that_is_no_number(dataset, tmp_path):
    found = fail(config(dataset, tmp_path / "nan", learning_rate=1, max_steps=20, max_grad_norm=0))
    assert not found.healthy and found.findings[0].name == "said-by-the-lab"
    assert "loss" in found.findings[0].symptom and found.findings[0].file.endswith("result.json")


def test_a_full_disk(dataset, tmp_path):
    options = config(dataset, tmp_path / "full", save_steps=1)
    found = limit(resource.RLIMIT_FSIZE, 2_000_000, lambda: fail(options))
    assert found.status == "failed" and found.findings[0].name in ("said-by-the-lab", "disk-full", "disk-quota")
    assert "room" in found.findings[0].symptom


def test_what_the_lab_refuses_is_passed_on(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        launch = ["launch", "--gpus-per-node", "2", "--launcher", "deepspeed", "--master-port", str(port), "train",
                  "--output-dir", str(tmp_path / "x"), "--dataset-path", "x"]  # fmt: skip
        refused = {"zero3": (["train", "--use-lora", "--use-4bit", "--deepspeed", "zero3"], "nothing is saved"),
                   "port": (launch, f"port {port} of this machine is in use")}  # fmt: skip
        for name, (arguments, words) in refused.items():
            assert main(arguments) == 2
            said = capsys.readouterr().err
            assert "sftlab doctor" not in said  # it has said what to do
            (tmp_path / f"{name}.log").write_text(said, encoding="utf-8")
            [found] = diagnosis.diagnose(tmp_path / f"{name}.log")
            assert found.findings[0].name == "said-by-the-lab" and words in found.findings[0].symptom
    assert found.findings[1].name == "port-in-use"  # the table has more to say


def test_an_unknown_error_is_shown_with_its_place(dataset, tmp_path, capsys, monkeypatch):
    from sftlab.train.trainer import LabTrainer

    def training_step(*_, **__):
        raise ZeroDivisionError("a new kind of trouble")

    monkeypatch.setattr(LabTrainer, "training_step", training_step)
    folder = tmp_path / "unknown"
    flags = f"train --dataset-path {dataset} --output-dir {folder} --max-steps 2 --no-bf16 --eval-samples 8"
    assert main(flags.split()) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.rstrip().endswith(f"sftlab doctor {folder} says more")
    assert main(["doctor", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "not known here" in said and "a new kind of trouble" in said and "test_diagnose.py" in said


def test_a_killed_run_and_a_healthy_one(dataset, tmp_path, capsys):
    run = background.start(config(dataset, tmp_path / "killed", max_steps=5000, save_steps=5))
    end = time.monotonic() + 120
    while not list(run.folder.glob("checkpoint-5/trainer_state.json")):
        assert time.monotonic() < end and state.read(run.folder).status in state.ACTIVE
        time.sleep(0.1)
    os.kill(state.read(run.folder).progress["process"]["pid"], signal.SIGKILL)
    while state.read(run.folder).status in state.ACTIVE:
        time.sleep(0.1)
    [found] = diagnosis.diagnose(run.folder)
    assert (
        found.status == "killed" and found.findings[0].name == "killed" and "checkpoint-" in found.findings[0].symptom
    )
    assert any("--resume" in mend for mend in found.findings[0].mend)


def test_a_healthy_run_a_flat_one_and_a_slow_one(dataset, tmp_path, capsys):
    options = {"use_lora": True, "learning_rate": 3e-3, "max_steps": 8}
    run.train(config(dataset, tmp_path / "well", **options))
    assert main(["doctor", str(tmp_path / "well"), "--no-slow"]) == 0
    assert "completed at step 8" in capsys.readouterr().out
    run.train(config(dataset, tmp_path / "flat", **options | {"learning_rate": 1e-7}))
    [found] = diagnosis.diagnose(tmp_path / "flat", slow=False)
    assert not found.healthy and [finding.name for finding in found.findings] == ["loss-flat"]
    run.train(
        config(
            dataset,
            tmp_path / "slow",
            gradient_checkpointing=True,
            eval_steps=1,
            eval_samples=0,
            **options | {"max_steps": 3, "batch_size": 1},
        )
    )
    [found] = diagnosis.diagnose(tmp_path / "slow")
    assert found.healthy and {"slow-checkpointing", "slow-evaluation"} <= {one.name for one in found.findings}


def test_slowness_is_told_from_numbers(tmp_path):
    assert diagnosis.share_padding([10, 1, 10, 1], TrainConfig(batch_size=4)) == pytest.approx(0.45)
    assert diagnosis.share_padding([10, 1, 10, 1], TrainConfig(batch_size=2)) == 0  # like with like
    run = state.Run(tmp_path / "run", "completed", config=TrainConfig(), history=[{"eval_runtime": 3}, {"loss": 1}])
    files.write_json(run.folder / "result.json", {"time": {"device": "cpu", "share": 0.02, "seconds": 10}})
    gpus = [{"index": 0, "use_percent": {"mean": 95}}, {"index": 1, "use_percent": {"mean": 31}}]
    files.write_json(tmp_path / "run-logs" / "summary.json", {"gpus": gpus})
    assert diagnosis.find_slow(run) == [
        "slow: evaluation: 30% of the time went into the validation loss",
        "slow: small steps: the run reached 2% of the rate of matrix products",
        "slow: idle GPU: a GPU was at 31% on average",
    ]


def test_curves_are_judged():
    def judge(losses, held_out=()):
        history = [{"loss": loss} for loss in losses] + [{"eval_loss": loss} for loss in held_out]
        return "".join(diagnosis.judge_losses(history))

    assert judge([5, 4, 3, float("nan")]).startswith("losses: nan at logged step 4")
    assert judge(["nan"]).startswith("losses: nan")
    assert judge([0.0] * 3).startswith("losses: 0.0")
    assert judge([5.0 + 0.01 * (at % 3) for at in range(12)]).startswith("losses: flat")
    assert judge([5.0 - 0.1 * at for at in range(12)]) == "" == judge([0.05] * 12) == judge([5.0] * 4)
    assert judge([5.0] * 12, [5, 3]) == ""
    assert judge([67, 70, 90, 100, 120, 130, 160, 172]).startswith(
        "losses: rising"
    )  # and no advice to take longer steps
    assert judge([2.82, 5.55, 6.18, 12.8, 8.6, 9.7, 7.4, 6.3, 6.3, 6.4, 5.4, 4.5, 4.6, 5, 4, 4.3]).startswith(
        "losses: rising"
    )


class Gate(BaseHTTPRequestHandler):
    """Answers as the Hub does, by the name of the repository."""

    STATES = {
        "denied": (403, "GatedRepo", "Access to model o/denied is restricted and you are not in the authorized list. Visit https://huggingface.co/o/denied to ask for access."),
        "anonymous": (401, "GatedRepo", "Access to model o/anonymous is restricted. You must have access to it and be authenticated to access it. Please log in."),
        "pending": (403, "GatedRepo", "Your request to access model o/pending is awaiting a review from the repo authors."),
        "right": (403, None, "Please enable access to public gated repositories in your fine-grained token settings to view this repository."),
        "none": (401, "RepoNotFound", "Invalid username or password."),
        "token": (401, None, "Invalid credentials in Authorization header"),
    }  # fmt: skip

    def do_HEAD(self):
        code, name, words = next(
            (state for part, state in self.STATES.items() if f"/{part}/" in self.path), (404, None, "")
        )
        self.send_response(code)
        for header, value in (("X-Error-Code", name), ("X-Error-Message", words), ("Content-Length", "0")):
            if value:
                self.send_header(header, value)
        self.end_headers()

    do_GET = do_HEAD


def test_the_hub_s_refusals_with_the_real_client(serve, tmp_path):
    script = ("import sys, traceback\nfrom huggingface_hub import hf_hub_download\nfor name in sys.argv[1:]:\n"
              "    try: hf_hub_download(f'o/{name}', 'config.json')\n"
              "    except Exception: open(f'{name}.log', 'w').write(traceback.format_exc())\n")  # fmt: skip
    token = "hf_" + "Q" * 34
    environment = os.environ | {
        "HF_ENDPOINT": serve(Gate),
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": token,
    }
    subprocess.run([sys.executable, "-c", script, *Gate.STATES], env=environment, cwd=tmp_path, check=True)
    rows = dict(zip(Gate.STATES, ("gated-not-granted", "gated-no-token", "gated-pending", "token-lacks-right", "no-such-model", "token-wrong"), strict=True))  # fmt: skip
    for name, row in rows.items():
        [found] = diagnosis.diagnose(tmp_path / f"{name}.log")
        assert found.findings[0].name == row, (name, [finding.name for finding in found.findings])
    assert "sftlab access o/denied" in diagnosis.diagnose(tmp_path / "denied.log")[0].findings[0].mend[0]


def test_a_dead_kernel_and_a_failed_cell(tmp_path, monkeypatch):
    facts = {
        "notebook": "05_lora",
        "parameters": {},
        "profile": "cpu",
        "source_sha256": "",
        "seconds": 9.0,
        "cell_source": "",
    }
    dead = {"status": "dead kernel", "cell": 7, "error": "The kernel died; most often the machine ran out of memory."}
    failed = {"status": "failed", "cell": 3, "error": "KeyError: 'text'"}
    well = {"status": "completed", "cell": None, "error": ""}
    for name, ended in (("a", dead), ("b", failed), ("c", well)):
        (tmp_path / f"{name}.json").write_text(json.dumps(facts | ended), encoding="utf-8")
    (tmp_path / "index.html").write_text("", encoding="utf-8")
    found = diagnosis.diagnose(tmp_path)
    assert [[finding.name for finding in one.findings] for one in found] == [["kernel-died"], ["missing-column"], []]
    assert "cell 8" in found[0].findings[0].file and found[2].healthy and not found[0].healthy


def test_the_rank_that_failed_first_comes_first(tmp_path):
    logs = tmp_path / "two-logs" / "ranks-0"
    logs.mkdir(parents=True)
    for rank, words in enumerate(["RuntimeError: Connection closed by peer [127.0.0.1]:1", "KeyError: 'text'"]):
        traced = f"Traceback (most recent call last):\n  File x\n{words}\n"
        (logs / f"20260101_rank{rank}.log").write_text(traced, encoding="utf-8")
    [found] = diagnosis.diagnose(tmp_path / "two")
    assert found.findings[0].name == "missing-column" and found.findings[0].file.endswith("rank1.log")
    assert found.findings[0].line == 3 and [one.name for one in found.findings] == ["missing-column"]


def test_several_errors_are_ranked_and_the_last_failure_counts():
    first = "Traceback (most recent call last):\n  File \"a.py\", line 1, in <module>\nKeyError: 'text'\n"
    last = first.replace("KeyError: 'text'", "IndexError: index out of range in self")
    found = known_errors.match(f"Token indices sequence length is longer than the specified maximum sequence length for this model (9 > 8)\n{first}{last}", "x")  # fmt: skip
    assert [finding.name for finding in found] == ["token-out-of-range", "missing-column", "too-long-rows"]
    launcher = (
        "Traceback (most recent call last):\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
    )
    assert [one.name for one in known_errors.match(first + launcher, "x")] == ["missing-column", "partner-gone"]


def test_no_token_and_no_home_is_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = "hf_" + "Z" * 34
    log = tmp_path / "error.log"
    log.write_text(
        f"HF_TOKEN={token}\nPermissionError: [Errno 13] Permission denied: '{tmp_path}/x {token}'\n", encoding="utf-8"
    )
    assert main(["doctor", str(log)]) == 1
    said = capsys.readouterr().out
    assert "'~/x" in said and token not in said and str(tmp_path) not in said
    for cut in range(40):  # wherever the line is cut
        log.write_text(
            f"{'y' * 300} x{token} {'z' * (80 - cut)}CUDA out of memory. Tried to allocate 2 GiB", encoding="utf-8"
        )
        assert main(["doctor", str(log)]) == 1
        assert token[-12:] not in capsys.readouterr().out
    log.write_text(
        f'Traceback (most recent call last):\n  File "{tmp_path}/a.py", line 1\nOddError: {token}\n', encoding="utf-8"
    )
    assert main(["doctor", str(log)]) == 1
    said = capsys.readouterr().out
    assert "OddError" in said and token not in said and str(tmp_path) not in said


def test_what_is_no_run_is_said(tmp_path, capsys):
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2
    assert "no run folder" in capsys.readouterr().err
