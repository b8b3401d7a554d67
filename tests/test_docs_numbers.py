"""Numbers in README and docs: each is the results' own, or says where it comes from (benchmarks/quote.py)."""

import re

import pytest
import quote

FEW = 'top1("DCP", 16)'
METHODS = {"text-probe": 70, "zero-shot": 50, "gda": 60}


@pytest.mark.parametrize("page", quote.PAGES, ids=lambda page: page.name)
def test_numbers_are_the_results(page):
    text = page.read_text()
    assert quote.renewed(text) == text, "run python benchmarks/quote.py"


@pytest.mark.parametrize("page", quote.PAGES, ids=lambda page: page.name)
def test_every_number_and_comparison_is_marked(page):
    text = page.read_text()
    assert quote.unmarked(text, page.name in quote.COMPARING) == []
    for path in re.findall(r"<!--from: ((?:tests|benchmarks|dcp_zoo)/[\w./]+)", text):
        assert (quote.ROOT / path).exists(), path


def test_values_are_rewritten_as_they_are_written(monkeypatch):
    monkeypatch.setattr(quote, "top1", lambda *args: 1234.56)
    monkeypatch.setattr(quote, "versus", lambda *args: "on par with")
    text = f'+5.0<!--= {FEW} --> and 7<!--= -{FEW} -->; DCP is better than<!--= versus("DCP", "CoOp") --> CoOp'
    expected = (
        f'+1,234.6<!--= {FEW} --> and -1,235<!--= -{FEW} -->; DCP is on par with<!--= versus("DCP", "CoOp") --> CoOp'
    )
    assert quote.renewed(text) == expected
    block = f"<!-- begin: {FEW} -->\n{{}}<!-- end -->"
    assert quote.renewed(block.format("old\n")) == block.format("\n1234.56\n\n")


def test_missing_results_are_an_error():
    with pytest.raises(LookupError, match="no row of few-shot.csv"):
        quote.renewed('5.0<!--= top1("Nothing") -->')


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It has 77.6 % and takes 3 ms, 1.5 x as long.", ["77.6 %", "3 ms", "1.5 x"]),
        ("67.0, 66.9 or a 20-second pause.", ["67.0", "66.9", "20-second"]),
        ("Python 3.10, `5 MB`, 16 shots, 300 x 225 pixels, 8-bit, [2 s](a_3 s)", ["2 s"]),
        (f"77.6<!--= {FEW} --> %, better than all", ["better"]),
        ("5 MB<!-- a comment --> and 6<!--from: arXiv 2305.17903--> points, no better", ["5 MB"]),
        ("The 95 % interval\n```text\n5 %\n```", []),
    ],
)
def test_what_needs_a_mark(text, found):
    assert quote.unmarked(text) == found
    assert quote.unmarked("as above", comparing=True) == ["above"]


def test_methods_are_compared_on_the_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    monkeypatch.setattr(quote, "results", quote.results.__wrapped__)
    monkeypatch.setattr(quote, "on_sets", quote.on_sets.__wrapped__)
    rows = [
        {
            "set": s,
            "images_per_class": k,
            "seed": 1,
            "method": m,
            "reading": r,
            "top1": x + k,
            "ece": 2,
            "train_cpu_seconds": 3,
        }
        for s, gain in (("cats", 1), ("dogs", 3))
        for k in (1, 4)
        for m, r, x in (("text-probe", "", 50), ("dcp, fast", "", 40), ("dcp, fast", "both", 50 + gain))
    ]
    quote.pd.DataFrame(rows[:-1]).to_csv(tmp_path / "many_sets.csv", index=False)
    assert quote.many_sets().splitlines()[2:] == [
        "| Text probe | 51.0 | 54.0 |  | 2.0 | 3 |",
        "| DCP, fast, no text probe | 41.0 | 44.0 | -10.0 (-10.0 to -10.0) * | 2.0 | 3 |",
        "| DCP, fast, both text probes | 53.0 | - | +1.7 (-1.2 to +4.5) | - | 3 |",
    ]
    alone = "DCP, fast, no text probe"
    assert (quote.set_gap(alone), quote.set_versus(alone)) == (-10, "worse than")
    assert quote.set_versus("DCP, fast, both text probes") == "on par with"
    assert quote.by_set("Text probe").splitlines()[2:] == [
        "| cats | Text probe | 51.0 | 54.0 |",
        "| dogs | Text probe | 51.0 | 54.0 |",
    ]


def test_rejection_is_averaged_over_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    numbers = ["auroc_near", "auroc_far", "known_refused", "near_passed", "far_passed"]
    rows = [("a", 4, 1, "energy", 60, 90, 4, 50, 20), ("a", 4, 2, "energy", 62, 92, 6, 52, 21)]
    rows += [("b", 4, 1, "energy", 70, 80, 5, 60, 25), ("a", 4, 1, "zero-shot", 80, 50, None, None, None)]
    frame = quote.pd.DataFrame(rows, columns=["set", "images_per_class", "seed", "score", *numbers])
    frame.to_csv(tmp_path / "rejection.csv", index=False)
    monkeypatch.setattr(quote, "results", quote.results.__wrapped__)
    assert quote.rejection().splitlines()[2:] == [
        "| 4 | energy | 64.0 | 87.3 | 80.0 | 5.0 | 54.0 | 22.0 |",
        "| 4 | zero-shot | 80.0 | 50.0 | 50.0 |  |  |  |",
    ]


def test_comparisons_are_paired(monkeypatch):
    """By hand: trained methods by shots and seed, zero-shot with each; a verdict needs an interval without 0."""
    rows = [(m, k, s, 50 + 10 * (m == "coop") + k + s) for m in ("dcp", "coop") for k in (1, 2) for s in (1, 2)]
    rows += [("zero-shot", 0, 0, 50), ("gda", 1, 1, 50), ("gda", 1, 2, 55)]
    frame = quote.pd.DataFrame(rows, columns=["method", "shots", "seed", "top1"])
    same = {"protocol": "few-shot", "model": "m", "weights": "w", "options": "", "stats": "", "selection": "none"}
    frame = frame.assign(**same, dataset="d", target="d", classes="all")
    monkeypatch.setattr(quote, "results", lambda file: quote.tables.with_labels(frame))
    assert quote.differences("CoOp", "DCP").tolist() == [10.0] * 4
    assert sorted(quote.differences("DCP", "Zero-shot")) == [2, 3, 3, 4]
    assert [quote.versus("DCP", x) for x in ("CoOp", "GDA", "Zero-shot")] == [
        "worse than",
        "on par with",
        "better than",
    ]
    listed = ["- **better than** Zero-shot (+3.0)", "- **on par with** GDA (+0.0)", "- **worse than** CoOp (-10.0)"]
    assert quote.standing(reference="DCP").splitlines()[2:] == listed
