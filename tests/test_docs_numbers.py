"""Numbers in README and docs: each is the results' own, or says where it comes from
(benchmarks/quote.py)."""

import re

import pytest
import quote

FEW = 'top1("DCP", 16)'
PAGES = [quote.PAGES[0], *(pytest.param(page, marks=pytest.mark.scripts) for page in quote.PAGES[1:])]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_numbers_are_the_results(page):
    text = page.read_text()
    assert quote.renewed(text, quote.quotes(page)) == text, "run python benchmarks/quote.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_number_and_comparison_is_marked(page):
    listed = quote.quotes(page)
    assert quote.unmarked(page.read_text(), listed, page.name in quote.COMPARING) == []
    for source in (source for entry in listed for source in quote.HOLE.findall(entry)):
        if path := re.match(r"from ((?:tests|benchmarks|dcp_zoo)/[\w./]+)", source):
            assert (quote.ROOT / path[1]).exists(), source


@pytest.mark.scripts
def test_values_are_rewritten_as_they_are_written(monkeypatch):
    monkeypatch.setattr(quote, "top1", lambda *args: 1234.56, raising=False)
    monkeypatch.setattr(quote, "versus", lambda *args: quote.LEVEL)
    listed = [f"+{{{{{FEW}}}}} and", f"{{{{-{FEW}}}}}; it is", 'it is {{versus("DCP", "CoOp")}} CoOp']
    text = "It has +5.0 and 7; it is\nbetter than CoOp."
    expected = f"It has +1,234.6 and -1,235; it is\n{quote.LEVEL} CoOp."
    assert quote.renewed(text, listed[1:3]) == expected.replace("+1,234.6", "+5.0")
    with pytest.raises(LookupError, match="0 times on the page"):
        quote.renewed("nothing", listed[:1])
    monkeypatch.setattr(quote, "names_of", lambda *args: "- **`a`**`(x)`\n  New.\n- **`b`**\n  Two.", raising=False)
    page = "# A page\n\n- **`a`**`(y)`\n  Old.\n\nThe end.\n"
    assert quote.renewed(page, ["table: names_of()"]) == page.replace("(y)`\n  Old.", "(x)`\n  New.\n- **`b`**\n  Two.")
    assert quote.renewed(page, ["page: names_of()"]) == "- **`a`**`(x)`\n  New.\n- **`b`**\n  Two.\n"
    assert quote.renewed(page, ["needs the end: The end."]) == page


@pytest.mark.scripts
def test_what_needs_a_quote():
    for text, listed, problems in (
        ("It has 77.6 % and takes 3 ms, 1.5 x as long.", [], ["77.6 %", "3 ms", "1.5 x"]),
        ("67.0, 66.9 or a 20-second pause.", [], ["67.0", "66.9", "20-second"]),
        ("Python 3.10, `5 MB`, 16 shots, 300 x 225 pixels, 8-bit, [2 s](a_3 s)", [], ["2 s"]),
        ("77.6 %, better than all", [f"{{{{{FEW}}}}} %,"], ["better"]),
        ("5 MB and 6 points, no better", ["and {{from arXiv 2305.17903}} points"], ["5 MB"]),
        ("The 95 % interval\n```text\n5 %\n```", [], []),
    ):
        assert quote.unmarked(text, listed) == problems
    assert quote.unmarked("as above", comparing=True) == ["above"]
