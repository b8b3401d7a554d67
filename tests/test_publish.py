"""Publishing to a Hub that takes uploads, with the stock client: the card, the files, the pin, and what goes
wrong."""

import json
import re
import shutil
import warnings
from pathlib import Path

import publish
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from shared import CommandLine

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo import release as cards
from dcp_zoo.data import DATASETS
from dcp_zoo.data.packaged import classnames, sample_images
from dcp_zoo.data.splits import split_sha256
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.zoo import registry

MINI = "dcp_mini.caltech101-16shot"
INDEX = "our-org/dcp-zoo-index"


PLAIN = {"split_sha256": split_sha256("caltech101"), "results": [{"stats": "", "top1": 60.0, "images": 2465}]}


@pytest.fixture
def run(monkeypatch, capsys) -> CommandLine:
    """`hub/publish.py`, for which zero-shot CLIP has been measured on Caltech-101."""
    monkeypatch.setattr(publish, "zero_shot", lambda head, settings: (PLAIN, ""))
    return CommandLine(monkeypatch, capsys, publish.app)


@pytest.fixture
def folder(tmp_path) -> Path:
    """What training writes, including its log."""
    folder = Path(shutil.copytree(registry.WEIGHTS / MINI, tmp_path / "head"))
    (folder / "log.csv").write_text("step\n")
    return folder


def test_a_published_head_is_loaded_by_its_pin(folder, uploads, manifest, monkeypatch, run):
    """From `hub/publish.py` to `create_model`, by the pin in the manifest."""
    run.ok(folder, "--org", "our-org", "--data-root", folder)
    files = uploads.files(f"our-org/{MINI}")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    entry = json.loads(manifest.read_text())[MINI]
    commit = next(reversed(uploads.repos[f"our-org/{MINI}"].commits))
    assert entry == json.loads(registry.MANIFEST.read_text())[MINI] | {"org": "our-org", "revision": commit}

    head = registry.HeadEntry(MINI, **entry | {"status": "published"})
    assert (head.pin, head.repo_id) == ((commit, entry["sha256"]), f"our-org/{MINI}")
    monkeypatch.setattr(registry, "all_heads", lambda: {MINI: head})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dcp_zoo.create_model(MINI, True)
    original = dcp_zoo.create_model(f"local-dir:{registry.WEIGHTS / MINI}", True)
    assert all(torch.equal(t, original.state_dict()[name]) for name, t in again.state_dict().items())
    assert again.info == original.info
    assert ModelCard.load(f"our-org/{MINI}").data.license == "apache-2.0"


def test_what_a_build_refuses_is_refused_alone(folder, uploads, run, tmp_path, monkeypatch):
    """A head that nobody has trained, and one that is worse than zero-shot CLIP."""
    options = ("--org", "our-org", "--data-root", folder)
    fresh = dcp_zoo.create_model("dcp_mini", "clip", classnames=classnames("caltech101"))
    named = {"dataset": "caltech101", "shots": 16, "seed": 1, "split_sha256": split_sha256("caltech101")}
    error = run.refused(fresh.save_pretrained(tmp_path / "fresh", **named), *options)
    for reason in ("losses are missing", "card lacks recipe, subset_sha256", "not measured with both kinds"):
        assert reason in error
    better = [PLAIN["results"][0] | {"top1": 95.0}]
    monkeypatch.setattr(publish, "zero_shot", lambda head, settings: (PLAIN | {"results": better}, "its split is odd"))
    error = run.refused(folder, *options, "--dry-run")
    assert re.search(r"top-1 89\.57 is over 2\.9 percentage points below zero-shot CLIP's 95\.00; its split is", error)
    assert uploads.requests == []


def test_the_index_keeps_what_others_list(uploads, monkeypatch):
    """Also if the Hub is busy, refuses a commit, or its answer is lost after the commit."""
    row = {"revision": "0" * 40, "sha256": "0" * 64, "license": "mit", "metrics": {"top1_stored": 50.0}}
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "our-org")
    for number, faults in enumerate(([], [412], [429, 0], [412] * 4)):
        uploads.faults = [("/commit/main", status) for status in faults]
        entries = {f"dcp_vitb16.dtd-{number + 1}shot": {**row, "status": "published"}}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            publish.retried(lambda entries=entries: publish.add_to_index("our-org", entries))
        attempts = [f"Attempt {2 + i} of 5 follows in" in str(warning.message) for i, warning in enumerate(told)]
        assert attempts == [True] * len(faults)
        listed = json.loads(uploads.files(INDEX)["heads.json"])
        assert listed == {f"dcp_vitb16.dtd-{n}shot": row for n in range(1, number + 2)}
        assert dcp_zoo.list_pretrained("dcp_vitb16.dtd*") == list(listed)  # in the same process
    publish.add_to_index("our-org", {"dcp_vitb16.dtd-1shot": row})  # which is there
    assert uploads.published() == {INDEX: 4}


def test_the_card(folder):
    """Its metadata are read back by the Hub's client, which rejects a model-index that it cannot parse."""
    (card := publish.prepare(folder, "our-org").card).save(folder / "README.md")
    metadata, text = metadata_load(folder / "README.md"), card.text
    data = ModelCardData(**metadata)
    assert data.to_dict() == metadata == ModelCard.load(folder / "README.md").data.to_dict()
    assert (data.library_name, data.license, data.pipeline_tag) == ("dcp-zoo", "apache-2.0", "image-classification")
    config = json.loads((folder / "config.json").read_text())["dcp"]
    alone, stored, batch = (config["metrics"][f"top1_{mode}"] for mode in ("no_classifier", "stored", "batch"))
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        "top-1, stored statistics, with a text probe": stored,
        "top-1, without the text probe": alone,
    }
    assert "coupling `bidirectional`, the paper's" in text
    assert "| DCP alone | with the text probe, stored statistics |" in text
    assert f"| {alone} | {stored} | {batch} |" in text
    assert f"**top-1 is {alone} % by DCP alone and {stored} % with the text probe**" in text
    size = f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    for part in ("## Intended use and limits", config["split_sha256"], f"| lr | {config['recipe']['lr']} |", size):
        assert part in text
    code = text.split("```python\n")[1].split("```")[0].replace(f"hf-hub:our-org/{MINI}", f"local-dir:{folder}")
    exec(code.replace('"photo.jpg"', repr(sample_images()[0])), {})  # the card's snippet runs


def test_without_its_text_probe_a_head_claims_what_it_has_alone():
    model = dcp_zoo.create_model(MINI, True, classifier="none")
    alone = registry.get_head(MINI).metrics["top1_no_classifier"]
    assert model.info["metrics"] == {"top1_stored": alone}
    card = cards.make_card(model, "me/photos", "mit", 1_000_000)
    assert [result.metric_value for result in card.data.eval_results] == [alone]
    assert f"| {alone} | not measured |" in card.text
    assert "text probe" not in card.text


def test_trained_heads_are_of_the_datasets_they_name():
    """As the card claims: their classes, split and test images."""
    for name in registry.trained_heads():
        head = registry.get_head(name)
        release, spec = publish.prepare(head.bundled_dir, "our-org"), DATASETS[head.dataset]
        assert release.repo_id == f"our-org/{name}"
        assert f"the {spec.num_classes} classes of **{head.dataset}**" in release.card.text
        assert release.card.data.datasets == [head.dataset]
        assert spec.part_note in release.card.text


def test_a_part_is_not_published_as_the_whole(tmp_path, uploads):
    flowers, eurosat = "dcp_mini.oxford_flowers50-16shot", "dcp_mini.eurosat_small-16shot"
    for name, change, reason in (
        (flowers, {"dataset": "oxford_flowers"}, "its 50 classes are not the 102 of oxford"),
        (eurosat, {"dataset": "eurosat"}, "on another split: its sha256 is 5fcd.*, not "),
        (MINI, {"test_images": 400}, "tested on 400 images, not on the 2,465 of caltech101"),
    ):
        folder = Path(shutil.copytree(registry.WEIGHTS / name, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dcp": config["dcp"] | change}))
        with pytest.raises(ZooError, match=f"cannot be published.*{reason}.*dcp-zoo train FOLDER"):
            publish.prepare(folder, "our-org")
        with pytest.raises(ZooError, match=reason):
            dcp_zoo.push_to_hub(dcp_zoo.create_model(str(folder), True), "me/photos")
    assert uploads.requests == []
    for block, change, reason in (
        ("dcp", {"dataset": "folder"}, r"not one of the zoo's heads, by .* has no head 'folder-.*push_to_hub"),
        ("model_args", {"n_ctx": 5}, "instead of"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {block: config[block] | change}))
        with pytest.raises(ZooError, match=reason):
            publish.prepare(folder, "our-org")


def test_a_head_of_another_method_has_a_card_but_no_place_in_the_zoo(tmp_path):
    clip = dcp_zoo.create_model("dcp_mini", "clip")
    head = LinearHead(clip.encoder, ["cat", "dog"], torch.ones(2, 512), torch.zeros(2))
    head.method, head.info = "gda", {"dataset": "folder", "shots": 4, "seed": 1, "metrics": {"top1_stored": 50.0}}
    card = cards.make_card(head, "me/pets", "mit", 1_000_000)
    assert "A classifier trained by gda" in card.text
    assert "The method is DCP" not in card.text
    assert "**folder**" not in card.text
    assert "datasets" not in card.data.to_dict()
    own = LinearHead(clip.encoder, classnames("caltech101"), torch.ones(100, 512), torch.zeros(100))
    own.method, own.info = "gda", {"dataset": "caltech101", "shots": 16, "seed": 2}
    own.info["split_sha256"] = split_sha256("caltech101")
    card = cards.make_card(own, "me/pets", "mit", 1_000_000)
    assert card.data.datasets == ["caltech101"]
    assert "Not measured." in card.text
    head.save_pretrained(tmp_path)
    with pytest.raises(ZooError, match=r"is a head of gda: .*push_to_hub"):
        publish.prepare(tmp_path, "me")


def test_push_to_hub(uploads, tmp_path):
    model = dcp_zoo.create_model(MINI, True, classnames=["temple", "flower"])
    saved = dcp_zoo.create_model(str(model.save_pretrained(tmp_path)), True)
    commit = dcp_zoo.push_to_hub(model, "me/photos", private=True)
    assert uploads.repos["me/photos"].private
    again = dcp_zoo.create_model(f"hf-hub:me/photos@{commit}", True)
    assert again.classnames == ["temple", "flower"]
    assert again.info == saved.info
    assert "caltech101" not in uploads.files("me/photos")["README.md"].decode()
