"""Formulas of a notebook's text as MathML, which browsers draw without MathJax, and so without a network.

python -c "from sftlab import formulas; print(formulas.draw_formulas('<p>$B A$ costs 5</p>'))"
"""

import re

FORMULA = re.compile(
    r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)(?<!\s)\$(?!\d)", re.DOTALL
)  # as Jupyter reads them: $5 and $6 are money


def draw_formulas(html: str) -> str:
    """HTML in which `$…$` and `$$…$$` are MathML; what stands in code, and what is no formula, stays as it is."""
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(html, "html.parser")
    replace_formulas(soup)
    return str(soup)


def replace_formulas(soup) -> None:
    """The same in a tree of Beautiful Soup's, in place."""
    from bs4 import BeautifulSoup
    from latex2mathml.converter import convert

    for piece in soup.find_all(string=FORMULA):
        if piece.find_parent(["code", "pre", "script", "style"]):
            continue
        done, end = [], 0
        for found in FORMULA.finditer(piece):
            shown, inline = found.groups()
            try:
                drawn = convert(shown or inline, display="block" if shown else "inline")
            except Exception:  # whatever the converter can't read is left to the reader
                continue
            done += [piece[end : found.start()], BeautifulSoup(drawn, "html.parser")]
            end = found.end()
        if done:
            piece.replace_with(*done, piece[end:])
