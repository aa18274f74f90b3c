"""Loading: true shapes, every architecture with LoRA, and clear words for a model that can't be had."""

import pytest

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError
from sftlab.hub import catalog, stand_in
from sftlab.hub.catalog import MODELS
from sftlab.models import load

KNOWN = [model.name for model in MODELS if model.name != "tiny-base"]


@pytest.mark.parametrize("name", KNOWN)
def test_the_catalogue_tells_the_true_number_of_parameters(name):
    import torch

    with torch.device("meta"):
        model = load.build_random(f"random:{name}")
    assert model.num_parameters() == catalog.find_model(name).parameters


@pytest.mark.parametrize("name", KNOWN)
def test_lora_finds_its_layers_in_every_architecture(name):
    from peft import get_peft_model

    model = load.build_random(f"random-tiny:{name}")
    lora = load.lora_config(TrainConfig(model_name=name, use_lora=True, lora_r=2))
    load.check_targets(model, lora.target_modules)
    adapted = {
        path.rsplit(".", 1)[-1] for path, part in get_peft_model(model, lora).named_modules() if hasattr(part, "lora_A")
    }
    assert adapted == set(catalog.find_model(name).lora_targets)


def test_a_target_that_matches_nothing_is_named_with_those_that_exist():
    with pytest.raises(UserError, match="no layer 'q_prj'. Did you mean 'q_proj'.*down_proj"):
        load.check_targets(load.load_model("tiny-base"), ["q_prj"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/nothing", "can't be reached"),
        ("tiny-bse", "Did you mean 'tiny-base'"),
        ("no spaces allowed", "no valid Hub id"),
        ("random:gpt5", "after random: comes a catalogue name"),
    ],
)
def test_an_unknown_model_without_a_network(name, message):
    with pytest.raises(UserError, match=message):
        load.load_model(name)


def test_a_folder_that_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load.load_model(str(tmp_path))


@pytest.fixture(scope="module")
def hub_server():
    with stand_in.serving() as address:
        yield address


def test_a_network_that_comes_back_is_used_again(monkeypatch, hub_server):
    from huggingface_hub import constants

    from sftlab.hub import client as hub_client

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub_client.reach() and constants.is_offline_mode()
    monkeypatch.setattr(constants, "ENDPOINT", hub_server)
    assert hub_client.reach() and not constants.is_offline_mode()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as the user said
    assert not hub_client.reach()


def train_from_hub(sftlab_command, dataset, tmp_path, server: str, name: str):
    return sftlab_command(
        "train", "--model-name", name, "--dataset-path", dataset, "--output-dir", tmp_path / "run", "--max-steps", "1",
        "--use-lora", HF_ENDPOINT=server, HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "cache"), OMP_NUM_THREADS="1",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"), [("lab/none", "the Hub has none of this name"), ("lab/pending", "access is gated")]
)
def test_an_unknown_and_a_gated_model_with_a_network(name, message, sftlab_command, dataset, tmp_path, hub_server):
    code, _, error = train_from_hub(sftlab_command, dataset, tmp_path, hub_server, name)
    assert code == 2 and message in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_model_from_the_hub_is_downloaded_and_trained(sftlab_command, dataset, tmp_path, hub_server):
    code, out, error = train_from_hub(sftlab_command, dataset, tmp_path, hub_server, "lab/public")
    assert code == 0, error
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_the_network_is_cut_here_and_in_child_processes(sftlab_command):
    import socket
    import subprocess
    import sys

    with pytest.raises(OSError, match="without a network"):
        socket.create_connection(("192.0.2.1", 443), timeout=2)
    child = "import socket; socket.getaddrinfo('huggingface.co', 443)"
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True)
    assert done.returncode == 1 and "without a network" in done.stderr
