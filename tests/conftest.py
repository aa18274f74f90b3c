"""What every test stands on: no network but loopback, one thread, a small prepared data set."""

import functools
import importlib.util
import os
import platform
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUT = ROOT / "tests" / "no_network"
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CUT), os.environ.get("PYTHONPATH", "")]))
os.environ["HF_HUB_OFFLINE"] = "1"
if os.environ.get("SFTLAB_TEST_GPU") != "1":  # the tests' numbers are those of a CPU; tests/test_gpu.py is for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
# a shell's job in the background ignores it; tests interrupt themselves and others
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if socket.getaddrinfo.__name__ != "guarded_lookup":  # this process was started before PYTHONPATH was set
    spec = importlib.util.spec_from_file_location("no_network", CUT / "sitecustomize.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """128 questions prepared for tiny-base, and 64 held-out ones."""
    from sftlab import files
    from sftlab.config.configs import DataConfig
    from sftlab.data import dataset as data_set
    from sftlab.evaluate import scores

    folder = tmp_path_factory.mktemp("prepared")
    files.write_json(folder / "held_out.json", scores.read_facts("test", 64))
    options = {"test_path": str(folder / "held_out.json"), "output_dir": str(folder)}
    return data_set.prepare(DataConfig(num_samples=128, seed=1, **options))


@pytest.fixture
def configure(dataset, tmp_path):
    """Makes the configuration of two steps, with some options, into tmp_path/NAME."""
    from sftlab.config.configs import TrainConfig

    def make(name: str = "run", **options):
        usual = {"dataset_path": str(dataset), "output_dir": str(tmp_path / name), "eval_samples": 8, "bf16": False}
        usual |= {"max_steps": 2, "batch_size": 4, "learning_rate": 2e-3, "logging_steps": 1}
        return TrainConfig(**usual | options)

    return make


@pytest.fixture
def short_run(configure):
    """The same for a short training with LoRA, by --num-epochs."""
    return functools.partial(configure, use_lora=True, max_steps=-1, batch_size=2, logging_steps=3)


@pytest.fixture(scope="module")
def tiny() -> tuple:
    """tiny-base and its tokenizer, in the Alpaca format."""
    from sftlab.data import formats
    from sftlab.models import load

    model, tokenizer = load.load_model("tiny-base"), load.load_tokenizer("tiny-base")
    formats.set_format(tokenizer, "alpaca")
    return model, tokenizer


@pytest.fixture(params=[False, True], ids=["float32", "bfloat16"])
def bf16(request) -> bool:
    """Both precisions, whatever the lab would choose here. Keep such tests small: many CPUs emulate bfloat16, slowly."""
    return request.param


@pytest.fixture(scope="session")
def tuned_run(dataset, tmp_path_factory) -> Path:
    """A run folder: LoRA on tiny-base in float32, three steps large enough to change it a lot, with a checkpoint."""
    from sftlab.config.configs import TrainConfig
    from sftlab.train import run

    folder = tmp_path_factory.mktemp("runs") / "first"
    run.train(TrainConfig(dataset_path=str(dataset), output_dir=str(folder), use_lora=True, max_steps=3, batch_size=8,
                            learning_rate=2e-2, max_length=128, bf16=False, eval_samples=8, save_steps=2))  # fmt: skip
    return folder


@pytest.fixture
def gone() -> dict:
    """A process that can't be: Linux counts to 2**22."""
    return {"pid": 2**22 + 1, "since_boot": 1.0, "host": platform.node()}


@pytest.fixture(scope="session")
def hub_address():
    """The address of a stand-in for the Hub."""
    from sftlab.hub import stand_in

    with stand_in.serving() as address:
        yield address


@pytest.fixture
def sftlab_command(capfd):
    """Runs `sftlab ARGUMENTS…`: (exit code, standard output, standard error). With environment variables it's a process of its own."""
    from sftlab import cli

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        arguments = list(map(str, arguments))
        if environment:
            done = subprocess.run([sys.executable, "-m", "sftlab", *arguments], capture_output=True, text=True,
                                  env=os.environ | environment, timeout=300)  # fmt: skip
            return done.returncode, done.stdout, done.stderr
        capfd.readouterr()
        try:
            code = cli.main(arguments)
        except SystemExit as stop:  # argparse leaves this way
            code = stop.code
        return code or 0, *capfd.readouterr()

    return run


def pytest_collection_modifyitems(items):
    """The file that takes longest begins first, so that no process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_browser.py")


def pytest_terminal_summary(terminalreporter):
    """Tests in a browser that had none are not passed over in silence."""
    left_out = [one for one in terminalreporter.stats.get("skipped", []) if "test_browser.py" in one.nodeid]
    if left_out:
        words = f"{len(left_out)} TESTS IN A BROWSER NOT RUN: no Chromium; `make browser` installs one"
        terminalreporter.section(words, bold=True)
