"""Draw README's picture from a run of notebook 00: the score before and after, once for light and once for dark pages.

sftlab run notebooks/00_start_here.ipynb --profile cpu --output-dir runs/00
python docs/make_pictures.py runs/00
"""

import json
import sys
from pathlib import Path

from sftlab import plots

IMAGES = Path(__file__).resolve().parent / "images"
PAGES = {"light": {}, "dark": {"ink": "#e6edf3", "ground": "#0d1117"}}  # GitHub's colours


def main(run: str) -> None:
    record = json.loads((Path(run) / "work" / "00_start_here" / "record.json").read_text(encoding="utf-8"))
    bars = {f"{lang}, {when}": record[when][lang] for lang in record["before"] for when in ("before", "after")}
    fig = plots.score_bars(bars, title="Exact answers to held-out questions, before and after fine-tuning")
    IMAGES.mkdir(exist_ok=True)
    for name, colours in PAGES.items():
        (IMAGES / f"before-after-{name}.svg").write_bytes(plots.draw_static(fig, "svg", **colours))
        print(f"saved {IMAGES / f'before-after-{name}.svg'}")


if __name__ == "__main__":
    main(sys.argv[1])
