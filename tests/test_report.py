"""The report, on made-up result files: no number here was measured."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import made_up_result as made_up
from scipy import stats

from dcp_zoo.benchmark import report, store
from dcp_zoo.benchmark.plan import Trial
from dcp_zoo.errors import ZooError

SHOTS, SEEDS = (1, 16), (1, 2, 3)
ZERO = report.title("zero-shot")


def few_shot_trials() -> list[tuple[Trial, float]]:
    """Two datasets; the linear probe lacks one of them at 16 shots."""
    found = []
    for dataset, level in (("caltech101", 50.0), ("dtd", 30.0)):
        found.append((Trial("few-shot", "dcp_mini", "zero-shot", dataset, 0, 0), level))
        for method, gain in (("linear-probe", 1.0), ("dcp", 5.0)):
            found += [
                (Trial("few-shot", "dcp_mini", method, dataset, k, seed), level + gain * k + seed)
                for k in SHOTS
                for seed in SEEDS
                if (method, dataset, k) != ("linear-probe", "dtd", 16)
            ]
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    for trial, top1 in few_shot_trials():
        modes = ("stored", "batch") if trial.method == "dcp" else ("",)
        store.save_result(folder, made_up(trial, *((trial.dataset, "all", c, top1 - (c == "batch")) for c in modes)))
    changed = Trial("few-shot", "dcp_mini", "dcp", "caltech101", 16, 1, (), (("depth", 3),))
    store.save_result(folder, made_up(changed, ("caltech101", "all", "stored", 130.0)))
    for method, k, base, new in (("zero-shot", 0, 60.0, 40.0), ("dcp", 16, 80.0, 20.0)):
        trial = Trial("base-to-new", "dcp_mini", method, "caltech101", k, int(k > 0))
        store.save_result(folder, made_up(trial, ("caltech101", "base", "", base), ("caltech101", "new", "", new)))
    shift = {"imagenet": 70.0, "imagenetv2": 60.0, "imagenet_a": 40.0}
    trial = Trial("domain-shift", "dcp_mini", "dcp", "imagenet", 16, 1, tuple(shift))
    store.save_result(folder, made_up(trial, *((name, "all", "", top1) for name, top1 in shift.items())))
    return folder


def tables(folder: Path, protocol: str) -> list[report.Table]:
    return report.tables_of(report.with_labels(store.gather(folder)), protocol)


def rows(table: report.Table) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


def test_few_shot_averages_only_complete_rows(sweep):
    average, caltech, dtd, _ = tables(sweep, "few-shot")
    assert average.header == ["method", "selection", "0", "1", "16"]
    assert (caltech.caption, dtd.caption) == ("caltech101", "dtd")
    assert rows(average)[ZERO] == ["none", "40.0", "-", "-"]
    assert rows(average)["DCP"] == ["none", "-", "47.0 ± 1.0", "122.0 ± 1.0"]  # 45 + seed, 120 + seed
    assert rows(average)["DCP, batch"][2] == "46.0 ± 1.0"
    # dtd lacks its 16 shots
    assert rows(average)["Linear probe"] == ["none", "-", "43.0 ± 1.0", "-"]
    assert rows(dtd)["Linear probe"] == ["none", "-", "33.0 ± 1.0", "-"]
    assert next(iter(rows(average))) == ZERO


def test_differences_are_paired_and_have_intervals(sweep):
    """DCP is 4 points ahead at 1 shot, always, and at 16 shots 64 on the only dataset with a linear
    probe."""
    *_, table = tables(sweep, "few-shot")
    assert table.header == ["method", "pairs", "1-shot", "16-shot", "all"]
    found = rows(table)["Linear probe"]
    assert found[:3] == ["9", "-4.0 (-4.0 to -4.0) *", "-64.0"]
    differences = [-34.0, -4.0]  # of two datasets, not of nine pairs
    mean, half = np.mean(differences), stats.t.ppf(0.975, 1) * stats.sem(differences)
    assert found[3] == f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def test_differences_are_from_dcp_without_its_probe_whatever_its_options(tmp_path):
    """As the guide to reproduce the paper sets them; of a grid it is the one with the fewest."""
    plain = (("classifier", "none"),)
    for method, options, top1 in (
        ("dcp", plain, 60.0),
        ("coop", (), 57.0),
        ("dcp", (*plain, ("coupling", "none")), 58.0),
    ):
        trial = Trial("few-shot", "dcp_mini", method, "dtd", 1, 1, (), options)
        modes = (("stored", top1), ("batch", top1 + 1)) if method == "dcp" else (("", top1),)
        store.save_result(tmp_path, made_up(trial, *(("dtd", "all", mode, value) for mode, value in modes)))
    *_, table = tables(tmp_path, "few-shot")
    assert table.caption == "Differences from DCP (classifier=none)"
    found = rows(table)
    assert found["CoOp"] == ["1", "-3.0", "-3.0"]
    assert found["DCP (classifier=none), batch"] == ["1", "+1.0", "+1.0"]
    assert found["DCP (classifier=none,coupling=none)"] == ["1", "-2.0", "-2.0"]


def test_base_to_new_has_the_harmonic_mean_and_domain_shift_the_mean_of_the_targets(sweep):
    (table,) = tables(sweep, "base-to-new")
    assert table.header == ["method", "base", "new", "H"]
    assert rows(table) == {ZERO: ["60.0", "40.0", "48.0"], "DCP, 16-shot": ["80.0", "20.0", "32.0"]}
    (table,) = tables(sweep, "domain-shift")
    assert table.header == ["method", "imagenet", "imagenetv2", "imagenet_a", "average of targets"]
    assert rows(table) == {"DCP, 16-shot": ["70.0", "60.0", "40.0", "50.0"]}


def test_published_figures_stand_in_rows_of_their_own(tmp_path, run):
    """On the same model, dataset and number of images; nothing that was measured is compared with them."""
    seeds = (1, 2, 3)
    grid = [("few-shot", "dcp", "dtd", 16), ("few-shot", "dcp", "eurosat", 16), ("base-to-new", "coop", "dtd", 16)]
    measured = [Trial(protocol, "dcp_vitb16", method, name, k, s) for protocol, method, name, k in grid for s in seeds]
    shifts = ("imagenet", "imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")
    measured.append(Trial("domain-shift", "dcp_vitb16", "dcp", "imagenet", 16, 1, shifts))
    for trial in measured:
        parts = ("base", "new") if trial.protocol == "base-to-new" else ("all",)
        entries = [(name, part, "", 70.0) for name in trial.targets or (trial.dataset,) for part in parts]
        store.save_result(tmp_path / "sweep", made_up(trial, *entries))
    run.ok("report", tmp_path / "sweep", "--output", tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    gda = "GDA, published in mrflogs/ICLR24"
    assert f"| {gda} | published | 71.3 ± 0.0 |" in page  # DTD, by three draws
    assert "| PLOT++, published in CHENGY12/PLOT | published | 71.4 |" in page
    assert f"| {gda} | published | 80.2 ± " in page  # DTD and EuroSAT
    assert f"| {gda}, 16-shot | 80.6 ± 0.4 | 59.8 ± 1.2 | 68.7 |" in page
    assert "| MaPLe, published in jameelhassan/PromptAlign, 16-shot | - | 64.1 | 49.1 | 50.9 | 77.0 | 60.3 |" in page
    assert "| 560fe211700964c915442ff98dbe47dd09656a35 | logs/base2new.log |" in page.partition("Published figures")[2]
    assert "Differences from DCP" not in page  # nothing else was measured
    assert "caltech101" not in page
    assert gda in (tmp_path / "report" / "report.tex").read_text()


def test_figures_of_other_weights_are_not_those_of_a_model(tmp_path, sweep, run):
    trial = Trial("few-shot", "dcp_vitb16", "dcp", "dtd", 16, 1)
    store.save_result(tmp_path / "other", made_up(trial, weights="laion"))
    for folder in (tmp_path / "other", sweep):  # and of the miniature
        run.ok("report", folder)
        assert "published in" not in (folder / "report" / "report.md").read_text()


def test_folders_with_another_precision_are_not_mixed(sweep, tmp_path):
    trial = Trial("few-shot", "dcp_mini", "dcp", "caltech101", 1, 1)
    result = made_up(trial, ("caltech101", "all", "stored", 1.0)) | {"precision": "other"}
    store.save_result(tmp_path / "other", result)
    with pytest.raises(ZooError, match=r"sweep/.*json and .*other/.*json differ in --precision: report them apart"):
        store.gather([sweep, tmp_path / "other"])


def test_report_files(sweep, tmp_path, run, monkeypatch):
    """Without Matplotlib there are no figures."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    broken = Trial("few-shot", "dcp_mini", "linear-probe", "dtd", 16, 2)
    store.save_failure(sweep, broken, "<script>alert(1)</script>", "")
    run.ok("report", sweep, "--output", tmp_path / "report")
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "| DCP | none | - | 47.0 ± 1.0 | 122.0 ± 1.0 |" in markdown
    assert f"`{broken.key}`: <script>" in markdown.partition("## Failed")[2]
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.md", "report.tex"]


def test_a_report_for_a_paper(sweep, tmp_path, run):
    """The same tables in LaTeX, the best of each column bold, and figures. TeX compiles it where there is
    one."""
    out = run.ok("report", sweep, "--output", tmp_path)
    tex = (tmp_path / "report.tex").read_text()
    assert r"DCP & none & - & \textbf{57.0 $\pm$ 1.0} & \textbf{132.0 $\pm$ 1.0} \\" in tex
    assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == tex.count(r"\begin{table}") > 5
    assert "imagenet\\_a" in tex
    for name in ("accuracy1.png", "accuracy1.pdf", "differences1.pdf"):
        assert (tmp_path / name).stat().st_size > 1000
        assert name in out
    if shutil.which("pdflatex"):
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
