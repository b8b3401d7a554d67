"""Claims that are measured again: of bundled heads and of cards; and submissions of others."""

import json
import shutil
from pathlib import Path

import pytest
import submit
import yaml
from PIL import Image
from shared import CommandLine

import dcp_zoo
from dcp_zoo import release as cards
from dcp_zoo.data import classnames, load_split
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.release.publish import prepare
from dcp_zoo.training.evaluation import measure
from dcp_zoo.zoo import registry

MINI = "dcp_mini.pacs_photo-16shot"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """PACS with three pictures of each class."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(classnames("pacs_photo")):
        for i in range(3):
            path = root / "pacs/photo" / name / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), (number * 30, i * 60, 255 - number * 30)).save(path)
    return root


@pytest.fixture(scope="module")
def measured(tmp_path_factory, data) -> Path:
    """The bundled head with the small data's split and the accuracies measured on it."""
    folder = Path(shutil.copytree(registry.WEIGHTS / MINI, tmp_path_factory.mktemp("measured") / "head"))
    split = load_split("pacs_photo", data)
    change(folder, split_sha256=split.sha256)
    model = dcp_zoo.create_model(f"local-dir:{folder}", True)
    metrics, _ = measure(model, ImageLoader(Photos(split.test), FeatureExtractor(model.encoder)))
    change(folder, metrics=metrics)
    return folder


@pytest.fixture
def head(measured, tmp_path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "head"))


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["dcp"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def claims(out: str) -> dict[str, str]:
    """What is said of each kind of statistics."""
    rows = [line.split() for line in out.splitlines()]
    return {row[0]: row[3] for row in rows if len(row) == 4 and row[3] in ("holds", "differs")}


def test_claims_are_measured_again(head, data, run, monkeypatch):
    command = ("eval", "--head", head, "--data-root", data, "--claim")
    out = run.ok(*command)
    assert "test top-1: " in out
    assert claims(out) == dict.fromkeys(("stored", "batch", "no_classifier"), "holds")
    metrics = json.loads((head / "config.json").read_text())["dcp"]["metrics"]
    change(head, metrics=metrics | {"top1_batch": metrics["top1_batch"] + 0.06})
    code, out, _ = run(*command)
    assert (code, claims(out)) == (1, {"stored": "holds", "batch": "differs", "no_classifier": "holds"})
    change(head, recipe={"eval_batch_size": 5})
    assert json.loads(run.ok(*command[:-1], "--json"))["batch_size"] == 5  # a claim is measured as it was before
    change(head, split_sha256="0" * 64)
    assert "was trained on another split of pacs_photo: its sha256 is 0000" in run.refused(*command)


def test_a_card_is_believed_before_the_checkpoint(head):
    name = f"local-dir:{head}"
    model = dcp_zoo.create_model(name, True)
    without = cards.claimed(name, model)
    release = prepare(registry.WEIGHTS / "dcp_mini.caltech101-1shot", "our-org/caltech")
    release.card.save(head / "README.md")
    stated = {mode: release.info["metrics"][f"top1_{mode}"] for mode in ("stored", "no_classifier")}
    assert cards.claimed(name, model) == without | stated
    assert set(without) == {"stored", "batch", "no_classifier"}


SUBMISSION = {
    "by": "A. Author",
    "where": "https://huggingface.co/author/head",
    "method": "DCP",
    "reference": "arXiv 2305.17903",
    "model": "dcp_mini",
    "pretraining_data": "WordNet and ImageNet; not PACS",
    "dataset": "dtd",
    "shots": 16,
    "seeds": [1],
    "split_sha256": submit.split_sha256("dtd"),
    "recipe": {"lr": 0.002},
    "selection": "none",
    "test_images_used": False,
    "test_time_optimisation": False,
    "deterministic": True,
    "license": "mit",
    "reported": 50.0,
}


@pytest.mark.scripts
def test_a_submission_is_measured(head, data, monkeypatch, capsys):
    submitted, file = CommandLine(monkeypatch, capsys, submit.app), head / "submission.yaml"
    assert "cannot be read" in submitted.refused(head)
    measured = json.loads((head / "config.json").read_text())["dcp"]["metrics"]["top1_stored"]
    file.write_text(yaml.safe_dump(SUBMISSION | {"reported": measured}))
    assert "says dataset: dtd, but the head in" in submitted.refused(head, "--data-root", data)
    monkeypatch.setattr(submit, "check_same", lambda *_: None)  # this head is of a dataset that no leaderboard has
    assert f'"measured": {measured}' in submitted.ok(head, "--data-root", data)
    file.write_text(yaml.safe_dump(SUBMISSION | {"reported": measured - 1 if measured > 50 else measured + 1}))
    assert f"but {measured:.2f} % was measured here" in submitted.refused(head, "--data-root", data)
