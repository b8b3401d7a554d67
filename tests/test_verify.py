"""Claims that are measured again: of bundled heads and of cards; and submissions of others."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import submit
import yaml
from PIL import Image
from publish import prepare
from shared import CommandLine

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.data import load_split
from dcp_zoo.release import cards
from dcp_zoo.zoo import registry

MINI = "dcp_mini.pacs_photo-16shot"
NAMES = ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """PACS with three pictures of each class."""
    root = tmp_path_factory.mktemp("data")
    for number, name in enumerate(NAMES):
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
    found = cards.measured("head", model, data)
    change(folder, metrics={f"top1_{stats}": value for stats, value in found.items()})
    return folder


@pytest.fixture
def submitted(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys, submit.app)


@pytest.fixture
def head(measured, tmp_path) -> Path:
    return Path(shutil.copytree(measured, tmp_path / "head"))


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["dcp"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def test_verify(head, data, run):
    out = run.ok("verify", "--head", head, "--data-root", data)
    assert "bidirectional" in out
    assert out.count("holds") == 3
    metrics = json.loads((head / "config.json").read_text())["dcp"]["metrics"]
    change(head, metrics=metrics | {"top1_batch": metrics["top1_batch"] + 0.06})
    code, out, _ = run("verify", "--head", head, "--data-root", data)
    assert (code, out.count("holds"), out.count("differs")) == (1, 2, 1)
    change(head, split_sha256="0" * 64)
    err = run.refused("verify", "--head", head, "--data-root", data)
    assert "was trained on another split of pacs_photo: its sha256 is 0000" in err


@pytest.mark.parametrize("classifier", ["text-probe", "none"])
def test_what_training_measures_is_verified(classifier, data, tmp_path, run):
    """A new head, with a text probe and without, read back from its checkpoint."""
    options = ("--set", "epochs=2", "--set", f"classifier={classifier}", "--output", tmp_path / "new")
    run.ok("train", "--method", "dcp", "--dataset", "pacs_photo", "--data-root", data, "--shots", "2", *options)
    assert (dcp_zoo.create_model(str(tmp_path / "new"), True).text_probe is not None) == (classifier == "text-probe")
    code, out, err = run("verify", "--head", tmp_path / "new", "--data-root", data)
    assert (code, out.count("holds")) == (0, 3 if classifier == "text-probe" else 2), err


def test_a_card_is_believed_before_the_checkpoint(head, data):
    without = {claim.stats: claim.claimed for claim in cards.verify(f"local-dir:{head}", data)}
    release = prepare(registry.WEIGHTS / "dcp_mini.caltech101-1shot", "our-org")
    release.card.save(head / "README.md")
    claims = {claim.stats: claim.claimed for claim in cards.verify(f"local-dir:{head}", data)}
    assert claims == without | {"stored": release.info["metrics"]["top1_stored"]}
    assert set(claims) == {"stored", "batch", "no_classifier"}


def test_all_go_on_after_one_that_cannot_be_measured(head, data, run, monkeypatch):
    monkeypatch.setattr("dcp_zoo.cli.evaluate.list_heads", lambda status: [MINI, str(head)])
    code, out, err = run("verify", "--all", "--data-root", data)
    assert (code, out.count("holds")) == (1, 3)
    assert f"{MINI}: {MINI} was trained on another split of pacs_photo" in err


def test_what_cannot_be_verified(head, data, run):
    change(head, metrics={})
    with pytest.raises(ZooError, match="claims no accuracy"):
        cards.verify(f"local-dir:{head}", data)
    for args in ((), ("--head", head, "--all")):
        assert "Pass one --head, or --all" in run.refused("verify", *args)
    assert set(registry.list_heads(status="bundled")) <= set(registry.trained_heads())


def test_tolerance():
    claim = cards.Claim("head", "batch", 70.0, 70.05)
    assert claim.holds
    assert not replace(claim, measured=70.06).holds


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": "red"}, "colour is none of by, where"),
        ({"test_images_used": True}, "test_images_used must be False, not True"),
        ({"test_time_optimisation": True}, "test_time_optimisation must be False, not True"),
        ({"selection": "test"}, "selection must be none or few-shot validation or cross-validation, not 'test'"),
        ({"split_sha256": "abc"}, "split_sha256 must be 64 hexadecimal digits"),
        ({"split_sha256": "0" * 64}, "split_sha256 does not match CoOp's split of dtd"),
        ({"by": ""}, "by must be a string, not None"),
        ({"seeds": [], "shots": "16"}, "shots must be an integer, not '16'; seeds must be a list"),
        ({"reported": 101}, "reported must be at most 100, not 101"),
        ({"dataset": "cifar10"}, "dataset must be imagenet or "),
        ({"measured": 50.0}, "must not state `measured`"),
    ],
    ids=str,
)
def test_what_is_not_admitted(tmp_path, submitted, changes, message):
    (tmp_path / "submission.yaml").write_text(yaml.safe_dump(SUBMISSION | changes))
    assert message in submitted.refused(tmp_path)


def test_a_submission_is_measured(head, data, submitted):
    file = head / "submission.yaml"
    assert "cannot be read" in submitted.refused(head)
    measured = json.loads((head / "config.json").read_text())["dcp"]["metrics"]["top1_stored"]
    file.write_text(yaml.safe_dump(SUBMISSION | {"reported": measured}))
    assert f'"measured": {measured}' in submitted.ok(head, "--data-root", data)
    file.write_text(yaml.safe_dump(SUBMISSION | {"reported": min(100.0, measured + 1) if measured < 99 else 1.0}))
    assert f"but {measured:.2f} % was measured here" in submitted.refused(head, "--data-root", data)
    (head / "config.json").unlink()
    (head / "model.safetensors").unlink()
    assert '"measured": null' in submitted.ok(head)
