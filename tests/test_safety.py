"""A token is where the user put it and nowhere else."""

import json
import os
import re
import subprocess
import sys

from course_notebooks import write_notebook

from sftlab.config.configs import FIELDS
from sftlab.hub import stand_in

TOKEN = stand_in.TOKENS["read"]


def test_planted_token_is_nowhere(tmp_path, dataset, hub_address):
    """It lies in a token file and in HF_TOKEN; commands of every kind run, well and badly; then all that they left is searched."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    (home / "token").chmod(0o600)
    look = "from sftlab.hub import token\nprint(token.describe_status())\ntoken.describe_status()"
    write_notebook(tmp_path / "own.ipynb", look, "from sftlab.hub import access\naccess.check_all(['planted/private'])")
    environment = os.environ | {"HF_TOKEN": TOKEN, "HF_HOME": str(home), "HF_ENDPOINT": hub_address, "HF_HUB_OFFLINE": "0",
                                "HF_HUB_VERBOSITY": "debug", "HOME": str(tmp_path)}  # fmt: skip
    train = ["train", "--dataset-path", str(dataset), "--use-lora", "--max-steps", "2", "--max-length", "64", "--eval-samples", "4",
             "--no-bf16", "--output-dir"]  # fmt: skip
    commands = [
        ["token", "--status"],
        ["access", "planted/private", "gpt2"],
        ["launch", "--gpus-per-node", "2", "--nodes", "2", "--slurm", *train, "batch"],
        [*train, "one"],
        ["train", "--model-name", "planted/private", "--dataset-path", str(dataset), "--output-dir", "none"],
        ["run", "own.ipynb", "--output-dir", "headless"],
        ["runs"],
        ["doctor", "one"],
        ["evaluate", "one", "--num-questions", "4", "--num-texts", "2", "--resamples", "100"],
        ["export", "one"],
    ]
    run_all = "import json, sys\nfrom sftlab import cli\nprint([cli.main(each) for each in json.loads(sys.argv[1])])"
    done = subprocess.run([sys.executable, "-c", run_all, json.dumps(commands)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    said = done.stdout + done.stderr
    assert set(json.loads(done.stdout.splitlines()[-1])) <= {0, 1, 2}, said[-3000:]
    assert TOKEN[-4:] in said and TOKEN not in said  # its last letters are shown, so that it's known which one it is
    assert (tmp_path / "one" / "result.json").is_file() and (tmp_path / "headless" / "own.html").is_file()
    holding = [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert holding == [home / "token"]


def test_no_command_takes_a_token(tmp_path, sftlab_command):
    """What stands in a command line is in the process list and in the shell's history, and papermill would store it."""
    assert not [name for name in FIELDS if re.search(r"token$|secret|password", name)]
    own = write_notebook(tmp_path / "own.ipynb", parameters="token: str = ''")
    given = ["-p", "token", TOKEN, "--output-dir", tmp_path / "out"]
    for command in (["run", own, *given], ["train", "--output-dir", TOKEN], ["token", TOKEN]):
        code, output, errors = sftlab_command(*command)
        assert code == 2 and TOKEN not in output + errors and "token" in errors and not (tmp_path / "out").exists()
