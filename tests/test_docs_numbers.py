"""Numbers in README and docs: each is the results' own, or says where it comes from (benchmarks/quote.py)."""

import re

import pytest
import quote

FEW = 'top1("DCP", 16)'
PAGES = [quote.PAGES[0], *(pytest.param(page, marks=pytest.mark.scripts) for page in quote.PAGES[1:])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_the_results(page):
    text = page.read_text()
    assert quote.renewed(text) == text, "run python benchmarks/quote.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_and_comparison_is_marked(page):
    text = page.read_text()
    assert quote.unmarked(text, page.name in quote.COMPARING) == []
    for path in re.findall(r"<!--from: ((?:tests|benchmarks|dcp_zoo)/[\w./]+)", text):
        assert (quote.ROOT / path).exists(), path


@pytest.mark.scripts
def test_values_are_rewritten_as_they_are_written(monkeypatch):
    monkeypatch.setattr(quote, "top1", lambda *args: 1234.56)
    monkeypatch.setattr(quote, "versus", lambda *args: quote.LEVEL)
    text = f'+5.0<!--= {FEW} --> and 7<!--= -{FEW} -->; better than<!--= versus("DCP", "CoOp") --> CoOp'
    expected = f'+1,234.6<!--= {FEW} --> and -1,235<!--= -{FEW} -->; {quote.LEVEL}<!--= versus("DCP", "CoOp") --> CoOp'
    assert quote.renewed(text) == expected
    block = f"<!-- begin: {FEW} -->\n{{}}<!-- end -->"
    assert quote.renewed(block.format("old\n")) == block.format("\n1234.56\n\n")


@pytest.mark.scripts
def test_what_needs_a_mark():
    for text, found in (
        ("It has 77.6 % and takes 3 ms, 1.5 x as long.", ["77.6 %", "3 ms", "1.5 x"]),
        ("67.0, 66.9 or a 20-second pause.", ["67.0", "66.9", "20-second"]),
        ("Python 3.10, `5 MB`, 16 shots, 300 x 225 pixels, 8-bit, [2 s](a_3 s)", ["2 s"]),
        (f"77.6<!--= {FEW} --> %, better than all", ["better"]),
        ("5 MB<!-- a comment --> and 6<!--from: arXiv 2305.17903--> points, no better", ["5 MB"]),
        ("The 95 % interval\n```text\n5 %\n```", []),
    ):
        assert quote.unmarked(text) == found
    assert quote.unmarked("as above", comparing=True) == ["above"]
