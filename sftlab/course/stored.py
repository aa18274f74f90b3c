"""The outputs that the notebooks are stored with: those of a run in the `cpu` profile, kept until a code cell changes.

python -m sftlab.course.stored notebooks    # runs what is stale and stores its outputs: `make render`
"""

import base64
import hashlib
import io
import itertools
import json
import platform
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

from sftlab import files, plots
from sftlab.course.headless import find_notebooks, run_notebooks
from sftlab.errors import run_guarded

KEPT = ("text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/svg+xml", plots.PLOTLY_MIME)
LIMIT = 400_000  # bytes of a notebook, which GitHub still shows
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:home|root|Users|tmp|var|work|mnt|opt)/\w")


def hash_sources(notebook: dict) -> str:
    """A hash of what makes the outputs: the sources of the code cells."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def find_faults(path: Path) -> list[str]:
    """What is wrong with a notebook's stored outputs; empty if nothing is."""
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    outputs = [(cell, output) for cell in cells for output in cell["outputs"]]
    printed = "\n".join(json.dumps(output.get("data", output), ensure_ascii=False) for _, output in outputs)
    found = {
        "has no stored outputs": not outputs,
        "has outputs of other sources": content["metadata"].get("sftlab", {}).get("sources") != hash_sources(content),
        "has a cell that was not run": any(cell["execution_count"] is None for cell in cells),
        "has an error in a cell that expects none": any(
            output["output_type"] == "error" and "raises-exception" not in cell["metadata"].get("tags", [])
            for cell, output in outputs
        ),
        "keeps an absolute path": bool(ABSOLUTE.search(printed)),
        "keeps the machine's name": len(platform.node()) > 3 and platform.node() in printed,
        "keeps more than names and tags": any(content["cells"][0]["metadata"]) or "widgets" in content["metadata"],
        f"is larger than {LIMIT:,} bytes": len(text.encode()) > LIMIT,
    }
    return [fault for fault, there in found.items() if there]


def store_outputs(source: Path, executed: Path) -> None:
    """Put the outputs of an executed copy into a notebook, without paths, warnings, widget state and the copy's own cells."""
    notebook, copy = nbformat.read(source, as_version=4), nbformat.read(executed, as_version=4)
    ran = [cell for cell in copy.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    work = executed.parent / "work"
    places = {str(work): "runs/lab", f"{files.ROOT}/": "", str(files.ROOT): "."}  # in this order
    places |= {sys.prefix: ".venv", str(Path.home()): "~"}
    counts = itertools.count(1)
    for cell, done in zip(notebook.cells, ran, strict=True):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            text = json.dumps([clean_output(o) for o in done.outputs if o.get("name") != "stderr"], ensure_ascii=False)
            for place, short in places.items():
                text = text.replace(place, short)
            cell.outputs, cell.execution_count = nbformat.from_dict(json.loads(text)), next(counts)
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    facts = {"kernelspec": kernel, "language_info": {"name": "python"}, "sftlab": {"sources": hash_sources(notebook)}}
    notebook.metadata = nbformat.from_dict(facts)
    files.write_text(source, nbformat.writes(notebook) + "\n")


def clean_output(output: dict) -> dict:
    """An output with the kinds of data that a reader sees, charts in 64 colours, and no metadata."""
    output = {key: value for key, value in output.items() if key != "metadata"}
    if "data" in output:
        output |= {"metadata": {}, "data": {kind: value for kind, value in output["data"].items() if kind in KEPT}}
        if png := output["data"].get("image/png"):
            small = io.BytesIO()
            Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB").quantize(64).save(small, "PNG", optimize=True)
            output["data"]["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def main(paths: list[str]) -> int:
    """Run and store what is stale among the notebooks; 0 if all are right afterwards."""
    notebooks = [found for path in paths or [files.ROOT / "notebooks"] for found in find_notebooks(Path(path))]
    stale = [path for path in notebooks if find_faults(path)]
    print(f"{len(stale)} of {len(notebooks)} notebooks to run")
    left = []
    with tempfile.TemporaryDirectory() as folder:
        for path in stale:
            (ended,) = run_notebooks([path], {}, Path(folder) / path.stem, profile="cpu")
            if ended["status"] == "completed":
                store_outputs(path, Path(folder) / path.stem / path.name)
            left += (faults := find_faults(path))
            print(f"{path.stem}: {'; '.join(faults) or 'stored'}")
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:]), sys.argv[1:]))
