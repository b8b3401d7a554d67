"""Numbers in README and docs: each is the results' own, or says where it comes from (benchmarks/quote.py)."""

import re

import pytest
import quote
from scipy import stats
from sets import REPORTING

FEW = 'top1("DCP", 16)'
FILES = ("many_sets", "baselines")
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
    monkeypatch.setattr(quote, "versus", lambda *args: quote.LEVEL)
    text = f'+5.0<!--= {FEW} --> and 7<!--= -{FEW} -->; better than<!--= versus("DCP", "CoOp") --> CoOp'
    expected = f'+1,234.6<!--= {FEW} --> and -1,235<!--= -{FEW} -->; {quote.LEVEL}<!--= versus("DCP", "CoOp") --> CoOp'
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


def test_methods_are_compared_over_sets(tmp_path, monkeypatch):
    """Two reporting sets of four draws each are two samples; what chose settings, other numbers of images, and a draw
    of one set alone are none."""
    monkeypatch.setattr(quote, "RESULTS", tmp_path)
    monkeypatch.setattr(quote, "results", quote.results.__wrapped__)
    monkeypatch.setattr(quote, "on_sets", quote.on_sets.__wrapped__)
    rows = [
        {
            "set": s,
            "images_per_class": k,
            "seed": seed,
            "method": m,
            "reading": r,
            "top1": x + k,
            "ece": 2,
            "train_cpu_seconds": 3,
        }
        for s, gain in (("EuroSAT", 1), ("flowers", 3), ("Caltech-101", -50))
        for k in (1, 4)
        for seed in (1, 2)
        for m, r, x in (("text-probe", "", 50), ("dcp, fast", "", 40), ("dcp, fast", "both", 50 + gain))
    ]
    frame = quote.pd.DataFrame([*rows, {**rows[0], "seed": 3, "top1": 99}])
    frame[~((frame.set == "flowers") & (frame.images_per_class == 4) & (frame.reading == "both"))].to_csv(
        tmp_path / "many_sets.csv", index=False
    )
    assert quote.many_sets().splitlines()[2:] == [
        "| Text probe | 51.0 | 54.0 |  | 2.0 | 3 | 2 |",
        "| DCP, fast | 41.0 | 44.0 | -10.0 (-10.0 to -10.0) * | 2.0 | 3 | 2 |",
        "| DCP, fast + text probes | 53.0 | - | +2.0 (-10.7 to +14.7) | - | 3 | 2 |",
    ]
    assert (quote.set_count(), quote.set_gap("DCP, fast"), quote.set_versus("DCP, fast")) == (2, -10, "worse than")
    assert quote.set_versus("DCP, fast + text probes") == "not significantly different from"
    assert quote.by_set("Text probe").splitlines()[2:] == [
        "| EuroSAT | Text probe | 51.0 | 54.0 |",
        "| flowers | Text probe | 51.0 | 54.0 |",
    ]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/models.md"])
def test_words_follow_the_interval_over_sets(page):
    """Computed again from the file, without the functions that write the words: the pages have no other such words, see
    `test_every_number_and_comparison_is_marked`."""
    words = re.findall(
        r"(better than|worse than|not significantly different from)<!--= set_versus\((.*?)\) -->",
        (quote.ROOT / page).read_text(),
    )
    assert words
    rows = quote.pd.concat(quote.pd.read_csv(quote.RESULTS / f"{x}.csv", keep_default_na=False) for x in FILES)
    rows = rows[rows.set.isin(REPORTING)]
    rows = rows.set_index(["method", "reading", "set", "images_per_class", "seed"]).top1.sort_index()
    probe = ("text-probe", "")
    readings = {
        '"DCP"': (("dcp", ""), probe),
        '"DCP, fast + text probes"': (("dcp, fast", "both"), probe),
        '"DCP + text probes"': (("dcp", "both"), probe),
        '"DCP, fast + text probes", "DCP + text probes"': (("dcp, fast", "both"), ("dcp", "both")),
        '"Text probe", "Linear probe, C = 100", file="baselines"': (
            ("text-probe", "x,stem"),
            ("linear-probe, C = 100", "x"),
        ),
        '"Text probe", "Linear probe, C = 100 on both", file="baselines"': (
            ("text-probe", "x,stem"),
            ("linear-probe, C = 100", "x+stem"),
        ),
    }
    others = {"GDA": "gda", "GDA, with validation images": "gda, with validation images"}
    for title, name in (others | {"Linear probe, C = 100": "linear-probe, C = 100"}).items():
        readings[f'"Text probe on the embedding", "{title}", file="baselines"'] = ("text-probe", "x"), (name, "x")
    for word, label in words:
        first, second = readings[label]
        gaps = (rows[first] - rows[second]).groupby("set").mean()
        half = stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
        clear = "better than" if gaps.mean() > 0 else "worse than"
        assert word == (clear if abs(gaps.mean()) > half else "not significantly different from"), label


def test_the_tables_have_every_method():
    """Of those that `benchmark` knows, on all reporting sets."""
    rows = quote.pd.concat(quote.pd.read_csv(quote.RESULTS / f"{x}.csv") for x in FILES)
    rows = rows[rows.set.isin(REPORTING)]
    measured = rows.groupby("method").set.nunique()
    assert {name: measured.get(name) for name in quote.METHODS} == dict.fromkeys(quote.METHODS, len(REPORTING))


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
    """By hand: trained methods by shots and seed, zero-shot with each; a verdict needs an interval over seeds without
    0, and shots of one seed are no samples of others."""
    rows = [(m, k, s, 50 + 10 * (m == "coop") + k + s / 9) for m in ("dcp", "coop") for k in (1, 2) for s in (1, 2)]
    rows += [("zero-shot", 0, 0, 50), ("gda", 1, 1, 50), ("gda", 1, 2, 52)]
    frame = quote.pd.DataFrame(rows, columns=["method", "shots", "seed", "top1"])
    same = {"protocol": "few-shot", "model": "m", "weights": "w", "options": "", "stats": "", "selection": "none"}
    frame = frame.assign(**same, dataset="d", target="d", classes="all")
    monkeypatch.setattr(quote, "results", lambda file: quote.report.with_labels(frame))
    assert quote.differences("CoOp", "DCP").tolist() == [10.0] * 2
    assert sorted(quote.differences("DCP", "Zero-shot")) == pytest.approx([1.5 + 1 / 9, 1.5 + 2 / 9])
    assert [quote.versus("DCP", x) for x in ("CoOp", "GDA", "Zero-shot")] == [
        "worse than",
        "not significantly different from",
        "better than",
    ]
    listed = [
        "- **better than** Zero-shot (+1.7)",
        "- **not significantly different from** GDA (+0.2)",
        "- **worse than** CoOp (-10.0)",
    ]
    assert quote.standing(reference="DCP").splitlines()[2:] == listed
