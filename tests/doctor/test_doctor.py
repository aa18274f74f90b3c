"""The check-up: each check sees what it's there for, one that breaks spoils no other, and nothing private is in the report."""

import os
import re
import shutil
from importlib import metadata

import pytest
import torch
from bitsandbytes import functional

from sftlab import files, machine
from sftlab.doctor import checks
from sftlab.doctor.checks import FAILS, NOTE, OK

PACKAGES = [({"trl": "1.16.99"}, NOTE, ["trl 1.16.99 (tested: "])]
PACKAGES += [({"trl": "0.9", "peft": None}, FAILS, ["trl 0.9 (needs", "peft is not installed"])]


def test_the_whole_check_up_on_this_machine(tmp_path, monkeypatch, sftlab_command):
    token = "hf_" + "Y" * 34
    for name, value in {"HF_TOKEN": token, "SFTLAB_BF16": "0", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    code, out, error = sftlab_command("doctor")
    assert code == 0 and "nothing fails" in out and token not in out + error and str(tmp_path) not in out
    assert re.search("note +device .*the course runs\\s+on this CPU", out) and re.search("note +network", out)
    names = "packages device precision quantization attention deepspeed memory disk token network notebooks".split()
    assert re.findall(r"^(?:ok|note) +(\S+) ", out, re.MULTILINE) == names
    assert "float32 is taken" in out and "there is one, from HF_TOKEN" in out and "4 bits off by 0.0" in out


def test_a_broken_installation_is_lines_that_fail(tmp_path, sftlab_command):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    code, out, error = sftlab_command("doctor", PYTHONPATH=f"{tmp_path}:{os.environ['PYTHONPATH']}")
    assert code == 1 and "fails  device" in out and "libcudart" in out, error
    assert "ok     packages" in out and f"of {len(checks.CHECKS)} fail: device" in out


@pytest.mark.parametrize(("installed", "outcome", "words"), PACKAGES)
def test_packages_that_are_missing_outside_or_untested(installed, outcome, words, monkeypatch):
    real = metadata.version

    def find(name):
        if installed.get(name, "1") is None:
            raise metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", find)
    state, found, step = checks.check_packages()
    assert state == outcome and all(part in found for part in words) and "-c constraints.txt" in step


def test_a_gpu_that_torch_can_not_use(monkeypatch):
    card = [{"index": 0, "name": "NVIDIA H100", "memory_total_bytes": 80 * 10**9}]
    monkeypatch.setattr(machine, "describe_gpus", lambda: card)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checks.check_device()[:2] == (NOTE, "1 GPUs, hidden by CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    for cuda, words in ((None, "is a build for CPUs"), ("13.0", "with CUDA 13.0 can't use it")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        state, found, step = checks.check_device()
        assert state == FAILS and words in found and step


@pytest.mark.parametrize(("disk", "memory", "outcome"), [(2e8, 5e8, FAILS), (5e9, 2e9, NOTE), (1e11, 1e10, OK)])
def test_little_disk_and_little_memory(disk, memory, outcome, monkeypatch):
    room = shutil.disk_usage("/")._replace(free=disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(machine, "free_memory", lambda gpu: memory)
    assert checks.check_disk()[0] == checks.check_memory()[0] == outcome


def test_a_quantization_that_does_not_work(monkeypatch):
    monkeypatch.setattr(functional, "dequantize_4bit", lambda weights, state: -weights.new_ones(64, 64).float())
    assert checks.check_quantization()[0] == FAILS


def test_the_kernel_of_another_python(monkeypatch, tmp_path):
    about = {"argv": ["/usr/bin/python9", "-m", "ipykernel_launcher"], "display_name": "x", "language": "python"}
    files.write_json(tmp_path / "kernels" / "python3" / "kernel.json", about)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    state, found, step = checks.check_notebooks()
    assert state == NOTE and "/usr/bin/python9" in found and "--sys-prefix" in step
