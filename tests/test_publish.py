"""Publishing to a Hub that takes uploads, with the stock client: the card, the files, the pin, and what goes
wrong."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from helpers import use_endpoint
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo import release as cards
from dcp_zoo.data import DATASETS
from dcp_zoo.data.packaged import classnames, sample_images
from dcp_zoo.data.splits import split_sha256
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import WEIGHTS_NAME, accuracy_text, waiting_file
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.release import publish
from dcp_zoo.zoo import registry

MINI = "dcp_mini.caltech101-16shot"
PLANNED = f"{MINI}-seed2"
INDEX = "our-org/dcp-zoo-index"


PLAIN = {"split_sha256": split_sha256("caltech101"), "results": [{"stats": "", "top1": 60.0, "images": 2465}]}


@pytest.fixture(autouse=True)
def zero_shot(monkeypatch) -> None:
    """Zero-shot CLIP has been measured on Caltech-101."""
    monkeypatch.setattr(publish, "zero_shot", lambda head, settings: (PLAIN, ""))


def change(folder: Path, **changes: object) -> None:
    """Change what a checkpoint stores about its training."""
    config = json.loads((folder / "config.json").read_text())
    config["dcp"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder(tmp_path) -> Path:
    """What training writes for a planned head, including its log."""
    folder = Path(shutil.copytree(registry.WEIGHTS / MINI, tmp_path / "head"))
    (folder / "log.csv").write_text("step\n")
    change(folder, seed=2)
    return folder


def become_another_user(monkeypatch, uploads, cache: Path) -> None:
    """One who is not logged in, has downloaded nothing, and knows no organisation."""
    use_endpoint(monkeypatch, uploads.url, cache)
    monkeypatch.setenv("HF_TOKEN", "")


def test_a_head_is_published_found_and_loaded_by_another_user(folder, uploads, monkeypatch, run, tmp_path):
    """Who knows no organisation, trusts nobody unasked, and gets the very head."""
    model = dcp_zoo.create_model(f"local-dir:{folder}", True)
    out = run.ok("publish", folder, "--to", "alice/things", "--license", "mit")
    assert sorted(uploads.files("alice/things")) == ["README.md", "config.json", "model.safetensors"]
    dcp_zoo.push_to_hub(model, "alice/secret", private=True)

    become_another_user(monkeypatch, uploads, tmp_path / "another")
    (found,) = dcp_zoo.list_heads(hub=True)
    commit = next(reversed(uploads.repos["alice/things"].commits))
    top1 = registry.get_head(MINI).metrics["top1_stored"]
    assert found == ("alice", "things", "caltech101", top1, commit)
    assert found.name in out
    assert re.search(rf"alice +things +caltech101 +{top1:.1f} % +{commit}", run.ok("list", "--hub"))
    assert not any("/resolve/" in request for request in uploads.requests[-2:])  # nothing is downloaded to list it
    assert dcp_zoo.list_heads("alice/*", hub=True) == dcp_zoo.list_heads("th*", hub=True) == [found]
    assert dcp_zoo.list_heads("bob/*", hub=True) == []
    assert "finds no head that matches bob/*" in run.refused("list", "bob/*", "--hub")
    assert PLANNED not in dcp_zoo.list_heads() + dcp_zoo.list_pretrained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = dcp_zoo.create_model(found.name, True)
    assert again.info == model.info
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in again.state_dict().items())
    assert ModelCard.load("alice/things").data.license == "mit"


def test_a_head_of_the_zoo_is_listed_in_the_index(folder, uploads, monkeypatch, run, tmp_path):
    """From which it is loaded by its name, pinned; of several organisations the first that lists it counts."""
    for org in ("our-org", "their-org"):
        run.ok("publish", folder, "--to", f"{org}/{PLANNED}", "--data-root", folder)
    become_another_user(monkeypatch, uploads, tmp_path / "another")
    assert PLANNED not in dcp_zoo.list_pretrained()
    for orgs, owner in (("our-org", "our-org"), ("nobody, their-org,our-org", "their-org")):
        monkeypatch.setenv("DCP_ZOO_HUB_ORG", orgs)
        assert PLANNED in dcp_zoo.list_pretrained()
        head = registry.newest(registry.get_head(PLANNED))
        assert (
            head.pretrained_cfg["hf_hub_id"]
            == f"{owner}/{PLANNED}@{next(reversed(uploads.repos[f'{owner}/{PLANNED}'].commits))}"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert dcp_zoo.create_model(PLANNED, True).info["seed"] == 2


def test_an_older_head_points_to_the_one_that_replaces_it(folder, uploads, run):
    run.ok("publish", folder, "--to", "alice/old")
    card = ModelCard.load("alice/old")
    run.ok("publish", folder, "--to", "alice/new", "--replaces", "alice/old")
    replaced = ModelCard.load("alice/old")
    assert replaced.data.to_dict() == card.data.to_dict() | {"new_version": "alice/new"}
    assert replaced.text.strip() == card.text.strip()
    assert "'new' names no organisation or user" in run.refused("publish", folder, "--to", "new")
    assert "has no repo alice/odl" in run.refused("publish", folder, "--to", "alice/new", "--replaces", "alice/odl")


def test_what_others_write_in_their_cards_breaks_no_list(uploads, run, tmp_path):
    """Nor does a Hub without the search; odd claims are none, and names cannot command a terminal."""
    card = ModelCardData(
        library_name="dcp-zoo",
        datasets=["cats\x1b[31m", "dogs"],
        model_name="odd",
        eval_results=[EvalResult("image-classification", "cats", "cats", "accuracy", "the best")],
    )
    (tmp_path / "README.md").write_text(f"---\n{card.to_yaml()}\n---\n")
    uploads.add("mallory/odd", {"README.md": tmp_path / "README.md"})
    (tmp_path / "README.md").write_text("---\ntags: [dcp-zoo]\n---\n")
    uploads.add("mallory/bare", {"README.md": tmp_path / "README.md"})
    (tmp_path / "README.md").write_text("---\ntags: [timm]\nlibrary_name: timm\n---\n")
    uploads.add("timm/vit", {"README.md": tmp_path / "README.md"})
    odd, bare = dcp_zoo.list_heads(hub=True)
    assert (odd.dataset, odd.top1) == ("cats\x1b[31m, dogs", None)
    assert (bare.dataset, bare.top1) == ("", None)
    assert "\x1b" not in run.ok("list", "--hub")
    uploads.faults = [("/api/models", 404)]
    assert "cannot be searched for heads" in run.refused("list", "--hub")


def test_what_a_build_refuses_is_refused_alone(folder, uploads, run, tmp_path, monkeypatch):
    """A head that nobody has trained, one that is worse than zero-shot CLIP, and one under another's name."""
    options = ("--to", f"our-org/{MINI}", "--data-root", folder)
    fresh = dcp_zoo.create_model("dcp_mini", "clip", classnames=classnames("caltech101"))
    named = {"dataset": "caltech101", "shots": 16, "seed": 1, "split_sha256": split_sha256("caltech101")}
    error = run.refused("publish", fresh.save_pretrained(tmp_path / "fresh", **named), *options)
    for reason in (
        "not finite or missing",
        "card lacks recipe, subset_sha256",
        "not measured with both kinds",
    ):
        assert reason in error
    better = [PLAIN["results"][0] | {"top1": 95.0}]
    monkeypatch.setattr(publish, "zero_shot", lambda head, settings: (PLAIN | {"results": better}, "its split is odd"))
    assert (
        f"not the zoo's head {MINI}: its model, kind, dataset, shots and seed are ['dcp_mini', 'dcp', "
        in run.refused("publish", folder, *options)
    )
    options = ("--to", f"our-org/{PLANNED}")
    assert "pass --data-root DIR" in run.refused("publish", folder, *options)
    error = run.refused("publish", folder, *options, "--data-root", folder, "--dry-run")
    assert re.search(r"top-1 89\.57 is too far below zero-shot CLIP's 95\.00; its split is", error)
    assert uploads.requests == []


def test_a_head_whose_save_was_killed_is_not_published(folder, uploads, run):
    """Its new weights wait beside the old ones."""
    old = (folder / WEIGHTS_NAME).read_bytes()
    dcp_zoo.create_model("dcp_mini", "clip", classnames=["a", "b"]).save_pretrained(folder, overwrite=True)
    new = folder / WEIGHTS_NAME
    new.rename(waiting_file(folder, sha256_of(new)))
    new.write_bytes(old)
    assert f"{WEIGHTS_NAME} is not the head's yet" in run.refused("publish", folder, "--to", "me/mine")
    assert uploads.requests == []


def test_the_index_keeps_what_others_list(uploads, monkeypatch):
    """Also if the Hub is busy, refuses a commit, or its answer is lost after the commit."""
    row = {"revision": "0" * 40, "sha256": "0" * 64, "license": "mit", "metrics": {"top1_stored": 50.0}}
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "our-org")
    for number, faults in enumerate(([], [412], [429, 0], [412] * 4)):
        uploads.faults = [("/commit/main", status) for status in faults]
        entries = {f"dcp_vitb16.dtd-{number + 1}shot": row}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            publish.retried(lambda entries=entries: publish.add_to_index("our-org", entries))
        attempts = [f"Attempt {2 + i} follows in" in str(warning.message) for i, warning in enumerate(told)]
        assert attempts == [True] * len(faults)
        listed = json.loads(uploads.files(INDEX)["heads.json"])
        assert listed == {f"dcp_vitb16.dtd-{n}shot": row for n in range(1, number + 2)}
        assert dcp_zoo.list_pretrained("dcp_vitb16.dtd*") == list(listed)  # in the same process
    publish.add_to_index("our-org", {"dcp_vitb16.dtd-1shot": row})  # which is there
    assert uploads.published() == {INDEX: 4}


def test_the_card(folder):
    """Its metadata are read back by the Hub's client, which rejects a model-index that it cannot parse."""
    (card := publish.prepare(folder, f"our-org/{PLANNED}").card).save(folder / "README.md")
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
    assert f"As it is loaded: {accuracy_text(config)}." in text
    assert f"**top-1 is {alone} % by DCP alone and {stored} % with the text probe**" in text
    size = f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    for part in ("## Intended use and limits", config["split_sha256"], f"| lr | {config['recipe']['lr']} |", size):
        assert part in text
    code = text.split("```python\n")[1].split("```")[0].replace(f"hf-hub:our-org/{PLANNED}", f"local-dir:{folder}")
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
        release, spec = publish.prepare(head.bundled_dir, f"our-org/{name}"), DATASETS[head.dataset]
        assert release.head == head
        assert f"the {spec.num_classes} classes of **{head.dataset}**" in release.card.text
        assert release.card.data.datasets == [head.dataset]
        assert spec.part_note in release.card.text


def test_a_part_is_not_published_as_the_whole(tmp_path, uploads):
    flowers, eurosat = "dcp_mini.oxford_flowers50-16shot", "dcp_mini.eurosat_small-16shot"
    for name, change, reason in (
        (flowers, {"dataset": "oxford_flowers"}, "which has other classes, split"),
        (eurosat, {"dataset": "eurosat"}, "which has other split"),
        (MINI, {"test_images": 400}, "which has other test images"),
    ):
        folder = Path(shutil.copytree(registry.WEIGHTS / name, tmp_path / name))
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dcp": config["dcp"] | change}))
        with pytest.raises(ZooError, match=f"cannot be published.*{reason}.*dcp-zoo train FOLDER"):
            publish.prepare(folder, "me/photos")
        with pytest.raises(ZooError, match=reason):
            dcp_zoo.push_to_hub(dcp_zoo.create_model(str(folder), True), "me/photos")
    assert uploads.requests == []
    for block, change, reason in (
        ("dcp", {"dataset": "folder"}, "not the zoo's head .* 'folder'"),
        ("model_args", {"n_ctx": 5}, "does not fit"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {block: config[block] | change}))
        with pytest.raises(ZooError, match=reason):
            publish.prepare(folder, f"me/{MINI}")


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
    with pytest.raises(ZooError, match=f"not the zoo's head {MINI}: .* 'linear'"):
        publish.prepare(tmp_path, f"me/{MINI}")


def test_push_to_hub(uploads, tmp_path):
    model = dcp_zoo.create_model(MINI, True, classnames=["temple", "flower"])
    saved = dcp_zoo.create_model(str(model.save_pretrained(tmp_path)), True)
    commit = dcp_zoo.push_to_hub(model, "me/photos", private=True)
    assert uploads.repos["me/photos"].private
    again = dcp_zoo.create_model(f"hf-hub:me/photos@{commit}", True)
    assert again.classnames == ["temple", "flower"]
    assert again.info == saved.info
    assert "caltech101" not in uploads.files("me/photos")["README.md"].decode()
