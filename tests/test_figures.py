"""The course's drawings: plain SVG files that are safe to embed and that read in light and dark."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = sorted((Path(__file__).parents[1] / "notebooks" / "figures").glob("*.svg"))
FORBIDDEN = {"script", "foreignObject", "image", "use", "a", "animate"}


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_figure(path):
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg" and root.get("viewBox")
    for name in ("title", "desc"):
        assert (root.findtext(f"{SVG}{name}") or "").strip(), f"no <{name}>"
    assert not FORBIDDEN & {element.tag.removeprefix(SVG) for element in root.iter()}
    attributes = [(key, value) for element in root.iter() for key, value in element.attrib.items()]
    assert not [key for key, _ in attributes if key.startswith("on") or key.endswith("href")]
    assert not re.search(r"@import|url\((?!#)", text), "something outside the file"
    assert "@media (prefers-color-scheme: dark)" in text
    sizes = [float(size) for size in re.findall(r"font(?:-size)?:[^;}]*?(\d+)px", text)]
    assert sizes and min(sizes) >= 12
    assert len(text.encode()) <= 12 * 1024
