"""Downloads: safe files only, size and room before anything moves, and what came whole is kept."""

import shutil

import pytest

from sftlab.errors import UserError
from sftlab.hub import download, stand_in
from sftlab.models import load

WEIGHTS = stand_in.StandIn.files / "model.safetensors"


class Breaking(stand_in.StandIn):
    """Breaks off where the weights begin. (One that breaks off once, in their middle, is in appendix A1.)"""

    def send_body(self, content):
        self.close_connection = len(content) > 1e6
        super().send_body(b"" if self.close_connection else content)


def test_what_broke_off_for_good_is_named_and_whole_files_are_kept(hub_address, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # before the client tries again
    with stand_in.serving(Breaking) as breaking, stand_in.visiting(breaking, tmp_path):
        with pytest.raises(UserError, match="the download broke off .* whole are kept. Start the same command again"):
            download.fetch_model("lab/public")
        assert download.find_snapshot("lab/public") is None and not list(tmp_path.rglob("*.incomplete"))
        assert [file.filename for file in download.plan("lab/public") if file.will_download] == [WEIGHTS.name]
    with stand_in.visiting(hub_address, tmp_path):
        download.fetch_model("lab/public")
    assert next(tmp_path.rglob("model.safetensors")).read_bytes() == WEIGHTS.read_bytes()


def test_a_model_is_fetched_once_announced_and_then_loaded_offline(hub_address, tmp_path, sftlab_command, capfd):
    with stand_in.visiting(hub_address, tmp_path, stand_in.TOKENS["read"]):
        code, _, error = sftlab_command("download", "lab/pending")
        assert code == 2 and "your request waits" in error and len(error.strip().splitlines()) == 1
        assert "nothing to fetch" in sftlab_command("download", "tiny-base")[1]
        code, out, error = sftlab_command("download", "lab/public")
        assert "lab/public: 8.24MB of 8.24MB to fetch, 6 of 7 files, into" in error and code == 0 and "whole: " in out
        load.locate("lab/public", weights=True)
        assert "to fetch" not in capfd.readouterr().err
        snapshot = download.find_snapshot("lab/public")
        snapshot.rename(snapshot.with_name("0" * 39 + "1"))  # the page has a newer commit, with the same weights
        assert not any(file.will_download and file.file_size > 1e6 for file in download.plan("lab/public"))
        snapshot.with_name("0" * 39 + "1").rename(snapshot)
    with stand_in.visiting("http://127.0.0.1:9", tmp_path):
        assert load.load_model("lab/public").num_parameters() > 1e6


def test_a_full_disk_is_named_before_anything_is_fetched(hub_address, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    message = r"8\.24MB are to be fetched .* 1\.00MB free: 7\.6\dMB more are needed.* HF_HOME"
    with stand_in.visiting(hub_address, tmp_path):
        with pytest.raises(UserError, match=message):
            load.load_model("lab/public")
        assert not list(tmp_path.rglob("*.safetensors"))


def test_only_safe_files_that_are_used_are_chosen():
    used = ["chat_template.jinja", "config.json", "merges.txt", "tokenizer.json", "tokenizer.model"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    pickles = ["pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5"]
    others = ["README.md", "LICENSE.txt", "consolidated.safetensors", "model.gguf", "modeling_own.py"]
    names = [*used, *parts, *pickles, *others, "original/params.json", "onnx/model.onnx"]
    assert download.choose_files(names) == sorted(used + parts)
    assert download.choose_files([*names, "model.safetensors"]) == sorted([*used, "model.safetensors"])
    for name, message in (("pytorch_model.bin", r"are pickles \(pytorch_model\.bin\)"), ("x.onnx", "holds no weights")):
        with pytest.raises(UserError, match=f"{message}.*safetensors/convert"):
            download.choose_files(["config.json", name])
