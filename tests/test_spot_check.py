"""A few labelled images say what a head is worth on a folder: which are chosen, that the interval holds, and
what is refused."""

import csv
import json
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import pytest
from helpers import noisy_picture

from dcp_zoo import FewShotClassifier, ZooError, spot_check
from dcp_zoo.inspection.spot_check import choose, share_of_all

COLORS = {"red": (160, 60, 60), "blue": (60, 60, 160), "grey": (105, 105, 105), "green": (60, 120, 60)}


def population(n: int, seed: int, shift: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """How sure a head is of n answers, and whether they are right: less often than it says, by `shift`."""
    rng = np.random.default_rng(seed)
    confidence = 1 - 0.7 * rng.beta(0.4, 2, n)
    return confidence, rng.random(n) < confidence - shift


@pytest.mark.parametrize("shift", [0, 0.4])
@pytest.mark.parametrize("count", [12, 30])
def test_the_interval_holds_and_the_estimate_is_unbiased(shift, count):
    confidence, right = population(600, 1, shift)
    truth = 100 * right.mean()
    held, errors = [], []
    for seed in range(300):
        chosen, strata = choose(confidence, count, seed)
        assert len(set(chosen)) == count
        assert np.bincount(strata[chosen]).min() >= 2
        found = share_of_all(np.bincount(strata), strata[chosen], right[chosen])
        held.append(found.low <= truth <= found.high + 1e-9)
        errors.append(found.percent - truth)
    assert np.mean(held) >= 0.93 - 2 * np.sqrt(0.93 * 0.07 / 300)  # and what chance takes
    assert abs(np.mean(errors)) < 4 * np.std(errors) / np.sqrt(300)


def test_a_choice_is_repeated_goes_on_and_prefers_the_unsure():
    confidence, _ = population(600, 2)
    chosen, strata = choose(confidence, 30, 1)
    assert choose(confidence, 30, 1)[0].tolist() == chosen.tolist()
    assert choose(confidence, 30, 2)[0].tolist() != chosen.tolist()
    assert set(chosen) < set(choose(confidence, 90, 1)[0])
    shares = np.bincount(strata[chosen]) / np.bincount(strata)
    assert shares.argmax() == np.argmin([confidence[strata == i].mean() for i in range(len(shares))])
    everything, strata = choose(confidence, 600, 1)
    right = confidence[everything] > 0.5
    found = share_of_all(np.bincount(strata), strata[everything], right)
    assert astuple(found) == pytest.approx([100 * right.mean()] * 3, abs=0.01)


@pytest.fixture
def folder(small_model, tmp_path, monkeypatch) -> dict[str, str]:
    """A head of four colours in `head`, and 80 new pictures in `new`: the colour of each."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)

    def pictures(place: str, count: int) -> tuple[list[str], list[str]]:
        labels = [*COLORS] * count
        return [noisy_picture(Path(place, f"{i}.png"), COLORS[name], rng) for i, name in enumerate(labels)], labels

    paths, labels = pictures("old", 14)
    FewShotClassifier(small_model).fit(paths, labels, groups=range(len(paths))).save("head")
    return dict(zip(*pictures("new", 20), strict=True))


def filled(table: Path, truth: dict[str, str], **names: str) -> None:
    """Fill in the column `class`; `names` for those that are called otherwise."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        rows = [*csv.DictReader(file)]
    known = {str(Path(path).resolve()): name for path, name in truth.items()}
    for row in rows:
        name = known[str(Path(row["file"]).resolve())]
        row["class"] = row["class"] or names.get(name, name)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def test_a_folder_is_checked_by_the_command_and_in_python(folder, run):
    command = ["eval", "new", "--head", "head"]
    code, out, err = run(*command, "--label", 12, "--output", "check")
    assert (code, len(out.splitlines())) == (0, 12)
    assert "add --labels check/found.csv" in err
    assert {path.name for path in Path("check").iterdir()} == {"found.csv", "found.html"}
    table = Path("check", "found.csv")
    assert "12 of 12 images have no class yet" in run.refused(*command, "--labels", table)
    filled(table, folder)
    out = run.ok(*command, "--label", 12, "--output", "check", "--labels", table)  # the same command
    assert "top-1 on all 80 images: at least" in out
    assert "where 5 % is promised" in out
    assert "trusted answer wrong" in out
    assert "more labels would halve the interval" in out

    found = spot_check("new", "head", labels=table)
    shown = json.loads(run.ok(*command, "--labels", table, "--json"))
    assert shown["accuracy"] == pytest.approx(asdict(found.accuracy))
    assert found.images == 80
    guesses = dict(zip(folder, FewShotClassifier.load("head").predict([*folder]), strict=True))
    truth = 100 * np.mean([guesses[path] == name for path, name in folder.items()])
    assert found.accuracy.low <= truth <= found.accuracy.high + 1e-9
    assert {each.verdict for each in found.promises} <= {"holds", "no sign against it"}

    more = spot_check("new", "head", labels=table, label=40, output="more")
    assert len(more.to_label) == 40
    filled(Path("more", "found.csv"), folder)
    narrower = spot_check("new", "head", labels="more/found.csv")
    width = narrower.accuracy.high - narrower.accuracy.low
    assert width < found.accuracy.high - found.accuracy.low


def test_what_cannot_be_told_is_refused(folder, run):
    command = ["eval", "new", "--head", "head"]
    assert "label must be" in run.refused(*command, "--label", 81, "--output", "check")
    chosen = spot_check("new", "head", label=12, output="check")
    assert [row.file for row in chosen.to_label] == [row.file for row in spot_check("new", "head", label=12).to_label]
    table = Path("check", "found.csv")
    as_chosen = table.read_bytes()
    filled(table, folder, red="pink")
    assert "Unknown class 'pink'" in run.refused(*command, "--labels", table)
    table.write_bytes(as_chosen)
    filled(table, folder, red="None of these")  # which counts as wrong
    assert spot_check("new", "head", labels=table).accuracy.percent < 90
    Path("new", "0.png").rename("new/1000.png")
    Path("new", "1.png").unlink()
    with pytest.raises(ZooError, match="chosen of another folder"):
        spot_check("new", "head", labels=table)
    with pytest.raises(ZooError, match="trained on"):
        spot_check("old", "head")
    assert "one head and a folder" in run.refused(*command, "--labels", table, "--claim")
    Path("plain.csv").write_text("file,class\nnew/2.png,red\n")
    with pytest.raises(ZooError, match="is no table of eval --label"):
        spot_check("new", "head", labels="plain.csv")
    assert "Cannot read none.csv" in run.refused(*command, "--labels", "none.csv")
    Path("empty.csv").touch()
    assert "Cannot read empty.csv" in run.refused(*command, "--labels", "empty.csv")
    with pytest.raises(ZooError, match="Cannot read empty.csv"):
        spot_check("new", "head", labels="empty.csv")
