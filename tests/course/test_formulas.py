"""Formulas of an exported page."""

from bs4 import BeautifulSoup

from sftlab.course.html import draw_formulas


def test_formulas_are_drawn_and_the_rest_stays():
    page = BeautifulSoup(draw_formulas(
        r"<p>Rank $r$: $\frac{\alpha}{r} BA$ &lt;b&gt;, $5 and $6.</p><p>$$W' = W + BA$$</p><code>$x$</code><p>$\nonsense{$</p>"), "html.parser")  # fmt: skip
    assert len(page.select("math")) == 3 and page.select("math mfrac") and page.select_one("math[display=block]")
    assert "$5 and $6." in page.text and "<b>" in page.text and page.code.text == "$x$" and "$r$" not in page.text
    assert r"$\nonsense{$" in page.text
