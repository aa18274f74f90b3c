"""The check-up: each check sees what it's there for, one that breaks spoils no other, and nothing private is in the report."""

import json
import os
import shutil
import socket
from importlib import metadata
from pathlib import Path

import pytest

from sftlab import machine
from sftlab.cli import main
from sftlab.config.configs import DoctorConfig
from sftlab.doctor import checks as doctor_checks
from sftlab.doctor.checks import FAILS, NOTE, OK


def test_the_whole_check_up_on_this_machine(sftlab_command, tmp_path):
    token = "hf_" + "Y" * 34
    code, out, error = sftlab_command("doctor", "--json", HF_TOKEN=token, HOME=str(tmp_path))
    found = json.loads(out)
    lines = {line["name"]: line for line in found["checks"]}
    assert list(lines) == list(doctor_checks.CHECKS)
    assert code == 0 and found["healthy"], [line for line in lines.values() if line["state"] == FAILS]
    assert lines["token"]["found"] == "one is set, by HF_TOKEN" and token not in out + error
    assert lines["device"]["state"] == NOTE and "the course runs on this CPU" in lines["device"]["found"]
    assert lines["network"]["state"] == NOTE and "4 bits off by 0.0" in lines["quantisation"]["found"]
    assert str(tmp_path) not in out and found["versions"]["torch"]
    assert sum(line["seconds"] for line in lines.values()) < 60  # about 5 s of an idle core


def test_a_check_that_raises_is_a_line_that_fails(monkeypatch, capsys):
    def broken():
        raise ImportError("/a/flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi")

    checks = {"python": doctor_checks.check_python, "attention": broken, "ports": doctor_checks.check_ports}
    monkeypatch.setattr(doctor_checks, "CHECKS", checks)
    assert doctor_checks.run(DoctorConfig()) == 1
    out = capsys.readouterr().out
    assert "undefined symbol" in out and "-> pip uninstall flash-attn" in out and "1 of 3 fail: attention" in out
    checks["attention"] = doctor_checks.check_bundle
    assert doctor_checks.run(DoctorConfig()) == 0 and "nothing fails" in capsys.readouterr().out


def test_packages_that_are_missing_outside_or_untested(monkeypatch):
    real = metadata.version
    assert doctor_checks.check_packages()[0] in (OK, NOTE)
    pin = doctor_checks.read_pins()["trl"]
    for found, state, words in (("0.9", FAILS, "trl 0.9 (needs"), ("1.16.99", NOTE, f"trl 1.16.99 (tested: {pin})"), (None, FAILS, "trl is not installed")):  # fmt: skip

        def version(name, found=found):
            if name != "trl":
                return real(name)
            if found is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)
        outcome = doctor_checks.check_packages()
        assert outcome[0] == state and words in outcome[1] and "-c constraints.txt" in outcome[2]


def test_a_gpu_that_torch_can_not_use(monkeypatch):
    card = [{"index": 0, "name": "NVIDIA H100", "memory_total_bytes": 80 * 10**9}]
    monkeypatch.setattr(machine, "describe_gpus", lambda: card)
    monkeypatch.setattr(machine, "read_driver", lambda: "525.60")
    assert doctor_checks.check_device()[:2] == (NOTE, "1 GPUs, hidden by CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, words in ((None, "is a build for CPUs"), ("13.0", "with CUDA 13.0 can't use it; driver 525.60")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        state, found, step = doctor_checks.check_device()
        assert state == FAILS and words in found and step


def test_a_quantisation_that_does_not_work(monkeypatch):
    from bitsandbytes import functional

    monkeypatch.setattr(functional, "dequantize_4bit", lambda held, state: -held.new_ones(64, 64).float())
    assert doctor_checks.check_quantisation()[0] == FAILS


def test_little_disk_and_little_memory(monkeypatch):
    room = shutil.disk_usage("/")
    for free, state in ((2 * 10**8, FAILS), (5 * 10**9, NOTE), (10**11, OK)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: room._replace(free=free))
        assert doctor_checks.check_disk()[0] == state
    for free, state in ((5 * 10**8, FAILS), (2 * 10**9, NOTE), (10**10, OK)):
        monkeypatch.setattr(machine, "free_memory", lambda gpu, free=free: free)
        assert doctor_checks.check_memory()[0] == state


def test_tools_a_port_and_downloads_that_were_cut_off(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda tool, path=None: None if tool == "g++" else tool)
    state, found, step = doctor_checks.check_compiler()
    assert state == NOTE and "g++ missing" in found and "apt install" in step
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("", 29500))
            taken.listen()
        except OSError:
            pass  # another program has it, which is as good
        state, found, step = doctor_checks.check_ports()
        assert state == NOTE and "in use" in found and step.startswith("--master-port ")
    from huggingface_hub import constants

    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "abc.incomplete").write_bytes(b"x" * 10**6)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    state, found, step = doctor_checks.check_cache()
    assert state == NOTE and "1 useless rests of downloads" in found and "in 1 models" in found and "prune" in step


def test_the_kernel_of_another_python(monkeypatch):
    from jupyter_client import kernelspec

    def get(program):
        return lambda name: kernelspec.KernelSpec(argv=[program, "-m", "ipykernel_launcher"])

    monkeypatch.setattr(kernelspec, "get_kernel_spec", get("/usr/bin/python9"))
    assert doctor_checks.check_notebooks()[0] == NOTE

    def none(name):
        raise kernelspec.NoSuchKernel(name)

    monkeypatch.setattr(kernelspec, "get_kernel_spec", none)
    assert doctor_checks.check_notebooks()[0] == FAILS


@pytest.mark.parametrize("arguments", [["doctor", "--help"], ["doctor", "--target"]])
def test_the_command_needs_no_library_to_explain_itself(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    told = capsys.readouterr()
    assert "RUN" in told.out + told.err


def test_the_report_holds_no_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "lab").mkdir()
    monkeypatch.setattr(doctor_checks, "CHECKS", {"x": lambda: (OK, f"{Path.home()}/lab {os.sep}", "")})
    assert doctor_checks.examine()[0].found == "~/lab /"
