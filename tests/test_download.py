"""Downloads: safe files only, size and room before anything moves, and no byte fetched twice after a break."""

import shutil

import pytest

from sftlab import download, models, resume, stand_in_hub
from sftlab.options import UserError

WEIGHTS = stand_in_hub.StandIn.files / "model.safetensors"


class Breaking(stand_in_hub.StandIn):
    """Breaks off in the middle of the weights, and then sends none until `mended`. `ranges` are the Range headers asked with."""

    ranges, mended = [], False

    def send_file(self, name):
        if name == "model.safetensors" and self.command == "GET":
            self.ranges.append(self.headers.get("Range"))
        super().send_file(name)

    def send_body(self, content):
        if len(content) > 1e6 and not self.mended:
            content = content[: len(content) // 2] if len(self.ranges) == 1 else b""
        super().send_body(content)
        if len(content) % 2 == 0 or not content:
            self.close_connection = True


@pytest.fixture
def breaking(monkeypatch):
    """A server that breaks off, seen by a client that doesn't wait before it tries again and works in small pieces."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 65536)
    Breaking.ranges, Breaking.mended = [], False
    with stand_in_hub.serving(Breaking) as address:
        yield address


def test_the_next_call_asks_for_the_rest_alone(breaking, tmp_path, capsys):
    size = WEIGHTS.stat().st_size
    with stand_in_hub.visiting(breaking, tmp_path):
        with pytest.raises(
            UserError, match="the download broke off .* What has come is kept: the same command goes on"
        ):
            download.fetch_asked("lab/public", yes=False)
        assert download.find_snapshot("lab/public") is None
        part = download.plan("lab/public")
        assert size * 0.4 < size - part.missing < size * 0.6 and "the rest is here" in download.describe(part)
        Breaking.ranges.clear()
        Breaking.mended = True
        folder = download.fetch_asked("lab/public", yes=False)
        assert len(Breaking.ranges) == 1 and Breaking.ranges[0].startswith(f"bytes={size // 2 // 65536 * 65536}-")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()
    assert not list(tmp_path.rglob("*.part"))
    assert "8.2 MB to fetch in 7 files" in capsys.readouterr().out


def test_a_line_that_breaks_once_is_taken_up_in_the_same_call(breaking, tmp_path, monkeypatch):
    ask = Breaking.send_file

    def mend(self, name):
        Breaking.mended = bool(self.ranges)
        ask(self, name)

    monkeypatch.setattr(Breaking, "send_file", mend)
    with stand_in_hub.visiting(breaking, tmp_path):
        folder = download.fetch(download.plan("lab/public"))
    assert Breaking.ranges[0] is None and Breaking.ranges[1].startswith("bytes=")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS.read_bytes()


def test_a_part_that_was_whole_already_is_only_checked(breaking, tmp_path):
    Breaking.mended = True
    with stand_in_hub.visiting(breaking, tmp_path):
        weights = next(file for file in download.plan("lab/public").files if file.sha256)
        part = resume.find_part(download.find_blobs("lab/public"), weights.sha256)
        part.parent.mkdir(parents=True)
        part.write_bytes(WEIGHTS.read_bytes())  # as a stop before the last step leaves it
        folder = download.fetch(download.plan("lab/public"))
    assert not Breaking.ranges and not part.exists() and (folder / "model.safetensors").is_file()


def test_halves_that_do_not_fit_are_not_taken_for_the_model(breaking, tmp_path):
    with stand_in_hub.visiting(breaking, tmp_path):
        with pytest.raises(UserError, match="broke off"):
            download.fetch(download.plan("lab/public"))
        part = next(tmp_path.rglob("*.part"))
        part.write_bytes(bytes(part.stat().st_size))
        Breaking.mended = True
        with pytest.raises(UserError, match="is not the Hub's file; it is removed"):
            download.fetch(download.plan("lab/public"))
        assert not list(tmp_path.rglob("*.part")) and download.find_snapshot("lab/public") is None
        download.fetch(download.plan("lab/public"))


@pytest.fixture(scope="module")
def address():
    with stand_in_hub.serving() as address:
        yield address


def test_a_model_is_fetched_once_said_before_and_then_loaded_offline(address, tmp_path, capsys):
    with stand_in_hub.visiting(address, tmp_path):
        model = models.load_model("lab/public")
        assert (
            "lab/public: 8.2 MB to fetch in 6 files of 8.2 MB; the rest is here; they go to" in capsys.readouterr().err
        )
        models.load_model("lab/public")
        assert "to fetch" not in capsys.readouterr().err
        assert "all 8.2 MB are here" in download.describe(download.plan("lab/public"))
        snapshot = download.find_snapshot("lab/public")
        snapshot.rename(snapshot.with_name("0" * 40))  # the page has a newer commit, with the same weights
        wanted = download.plan("lab/public")
        assert [file.name for file in wanted.files if not file.whole and file.size > 1e6] == []
        snapshot.with_name("0" * 40).rename(snapshot)
    with stand_in_hub.visiting("http://127.0.0.1:9", tmp_path):
        assert models.load_model("lab/public").num_parameters() == model.num_parameters()


def test_a_full_disk_is_told_before_anything_is_fetched(address, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    with stand_in_hub.visiting(address, tmp_path):
        with pytest.raises(
            UserError, match=r"8\.2 MB are to be fetched .* 1\.0 MB free: 7\.7 MB more are needed.* HF_HOME"
        ):
            models.load_model("lab/public")
        assert not list(tmp_path.rglob("*.safetensors")) and not list(tmp_path.rglob("*.part"))


def test_only_safe_files_that_are_used_are_chosen():
    names = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "README.md", "LICENSE.txt",
             "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
             "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "model.gguf",
             "original/params.json", "onnx/model.onnx", "tf_model.h5", "modeling_own.py"]  # fmt: skip
    assert download.choose_files(names) == [
        "chat_template.jinja", "config.json", "merges.txt", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    assert "model-00001-of-00002.safetensors" not in download.choose_files([*names, "model.safetensors"])


@pytest.mark.parametrize(
    ("name", "message"), [("pytorch_model.bin", r"are pickles \(pytorch_model\.bin\)"), ("x.onnx", "holds no weights")]
)
def test_a_repository_without_safetensors_is_refused(name, message):
    with pytest.raises(UserError, match=f"{message}.*safetensors/convert"):
        download.choose_files(["config.json", name])


@pytest.mark.parametrize(
    ("files", "whole"), [(["model.safetensors"], True), ([], False), (["a"], False), (["a", "b"], True)]
)
def test_a_model_is_whole_when_each_part_of_its_index_is_there(files, whole, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "a", "y": "b"}}')
    for name in files:
        (tmp_path / name).write_bytes(b"")
    assert download.is_whole(tmp_path) == whole


def test_the_command_asks_before_much_and_not_before_little(sftlab_command, address, tmp_path, monkeypatch):
    online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    code, out, error = sftlab_command("download", "lab/public", **online)
    assert code == 0 and "to fetch" in out and "whole: " in out, error
    code, out, error = sftlab_command("download", "lab/pending", HF_TOKEN=stand_in_hub.TOKENS["read"], **online)
    assert code == 2 and "your request waits" in error and len(error.strip().splitlines()) == 1
    assert sftlab_command("download", "tiny-base")[1].strip() == "tiny-base: nothing to fetch, it is on this machine"
    monkeypatch.setattr(download, "SMALL", 10**6)
    with stand_in_hub.visiting(address, tmp_path / "other"):
        with pytest.raises(UserError, match="no terminal to ask on. Add --yes"):
            download.fetch_asked("lab/public", yes=False)
        assert download.fetch_asked("lab/public", yes=True).is_dir()
