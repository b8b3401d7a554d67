"""Publishing without a Hub: the card, the files to upload, and the pin."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import filter_repo_objects

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.cli import main
from dcp_zoo.data.samples import sample_images
from dcp_zoo.zoo import publish, registry

MINI = "dcp_mini.caltech101-16shot"
COMMIT = "c0ffee" * 6 + "abcd"


@pytest.fixture
def folder(tmp_path) -> Path:
    """What training writes, including its log."""
    folder = Path(shutil.copytree(registry.WEIGHTS / MINI, tmp_path / "head"))
    (folder / "log.csv").write_text("step\n")
    return folder


@pytest.fixture
def uploaded(tmp_path, monkeypatch) -> Path:
    """The client's upload is faked: the files to upload land here."""
    target = tmp_path / "uploaded"

    def create_repo(self, repo_id, *, private, exist_ok):
        huggingface_hub.utils.validate_repo_id(repo_id)
        (target / repo_id).mkdir(parents=True)

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        files = [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            shutil.copy(Path(folder_path) / name, target / repo_id / name)
        return SimpleNamespace(oid=COMMIT)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return target


@pytest.fixture
def manifest(tmp_path, monkeypatch) -> Path:
    """The empty manifest of a source checkout."""
    path = tmp_path / "checkout" / "dcp_zoo" / "zoo" / "heads.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "checkout" / "setup.cfg").touch()
    path.write_text("{}")
    monkeypatch.setattr(publish, "MANIFEST", path)
    monkeypatch.setattr(publish.pin, "__defaults__", (path,))
    return path


def run(monkeypatch, *args: object) -> int:
    monkeypatch.setattr("sys.argv", ["dcp-zoo", "publish", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_uploaded_files_load_back(folder, uploaded, manifest, monkeypatch, capsys):
    assert run(monkeypatch, folder, "--org", "our-org") == 0, capsys.readouterr().err
    tree = uploaded / "our-org" / MINI
    assert sorted(p.name for p in tree.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again, original = (dcp_zoo.create_model(f"local-dir:{f}", True) for f in (tree, registry.WEIGHTS / MINI))
    state = original.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in again.state_dict().items())
    assert again.info == original.info

    entry = json.loads(manifest.read_text())[MINI]
    assert entry == json.loads(registry.MANIFEST.read_text())[MINI] | {
        "org": "our-org",
        "revision": COMMIT,
    }
    head = registry.Head(MINI, **entry)
    assert head.pin == (COMMIT, entry["sha256"])
    assert head.repo_id == f"our-org/{MINI}"


def test_a_planned_head_becomes_published(folder, manifest):
    """Only the manifest changes: name, organisation, commit, hash, licence and metrics."""
    config = json.loads((folder / "config.json").read_text())
    config["dcp"] |= {"seed": 3}
    (folder / "config.json").write_text(json.dumps(config))
    release = publish.prepare(folder, "our-org", license="mit")
    assert release.head.name == "dcp_mini.caltech101-16shot-seed3"
    assert publish.pin(release, COMMIT)
    (entry,) = json.loads(manifest.read_text()).values()
    assert (entry["status"], entry["license"], entry["metrics"]) == ("published", "mit", config["dcp"]["metrics"])


def test_an_installed_package_is_not_written(folder, tmp_path, uploaded, monkeypatch, capsys):
    path = tmp_path / "site-packages" / "dcp_zoo" / "zoo" / "heads.json"
    monkeypatch.setattr(publish.pin, "__defaults__", (path,))
    assert run(monkeypatch, folder, "--org", "our-org") == 0
    assert f'"revision": "{COMMIT}"' in capsys.readouterr().out
    assert not path.exists()


def test_dry_run_sends_and_writes_nothing(folder, monkeypatch, capsys):
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: pytest.fail("the Hub was contacted"))
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run(monkeypatch, folder, "--org", "our-org", "--dry-run") == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert capsys.readouterr().out.startswith("---\n")


def test_the_card_is_valid_metadata(folder):
    """Read back by the Hub's client, which rejects a model-index that it cannot parse."""
    card = publish.prepare(folder, "our-org").card
    card.save(folder / "README.md")
    metadata = metadata_load(folder / "README.md")
    data = ModelCardData(**metadata)
    assert data.to_dict() == metadata == ModelCard.load(folder / "README.md").data.to_dict()
    assert (data.library_name, data.license, data.pipeline_tag) == ("dcp_zoo", "apache-2.0", "image-classification")
    assert data.datasets == ["caltech101"]
    metrics = json.loads((folder / "config.json").read_text())["dcp"]["metrics"]
    found = {result.metric_name: result.metric_value for result in data.eval_results}
    assert found == {
        "top-1, calibrated context": metrics["top1_calibrated"],
        "top-1, batch context": metrics["top1_batch"],
    }


def test_contents_of_the_card(folder, monkeypatch):
    seed2 = registry.Head(f"{MINI}-seed2", status="published", metrics={"top1_calibrated": 12.5})
    monkeypatch.setattr(publish, "trained_heads", lambda: {seed2.name: seed2})
    text = publish.prepare(folder, "our-org").card.text
    config = json.loads((folder / "config.json").read_text())["dcp"]
    assert f"| 1 | {config['metrics']['top1_calibrated']} | {config['metrics']['top1_batch']} |" in text
    assert "| 2 | 12.5 | not measured |" in text
    size = f"{(folder / 'model.safetensors').stat().st_size / 1e6:.1f} MB"
    for part in ("## Intended use and limits", config["split_sha256"], f"| lr | {config['recipe']['lr']} |", size):
        assert part in text
    code = text.split("```python\n")[1].split("```")[0].replace(f"hf-hub:our-org/{MINI}", f"local-dir:{folder}")
    exec(code.replace('"photo.jpg"', repr(sample_images()[0])), {})  # the card's snippet runs


def test_public_names_of_datasets():
    assert publish.public_name("hf://datasets/me/pets@main:small") == "me/pets"
    assert publish.public_name("wds:///home/me/shards") == "webdataset shards"
    assert publish.public_name("dtd") == "dtd"
    assert publish.public_name(None) is None


def test_base_model_of_a_clip_head(tmp_path):
    model = dcp_zoo.create_model("dcp_vitb16", classnames=["cat", "dog"])
    metadata = publish.make_card(model, "me/pets", "mit", "22 MB").data.to_dict()
    assert metadata["base_model"] == "timm/vit_base_patch16_clip_224.openai"
    assert "model-index" not in metadata


def test_invalid_folders_are_rejected(folder, uploaded, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"dataset": "folder"}, r"not one of the zoo's heads .*push_to_hub"),
        ({"shots": 3}, "not one of the zoo's heads"),
        ({"n_ctx": 5}, "of another shape"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"dcp": config["dcp"] | change}))
        with pytest.raises(ZooError, match=message):
            publish.prepare(folder, "our-org")
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ZooError, match="damaged"):
        publish.prepare(folder, "our-org")
    with pytest.raises(ZooError, match="is not a checkpoint"):
        publish.prepare(tmp_path / "none", "our-org")
    assert not uploaded.exists()


def test_push_to_hub(uploaded):
    model = dcp_zoo.create_model(MINI, True, classnames=["temple", "flower"])
    model.info |= {"dataset": "wds:///home/me/shards"}
    assert dcp_zoo.push_to_hub(model, "me/photos", private=True) == COMMIT
    again = dcp_zoo.create_model(f"local-dir:{uploaded / 'me/photos'}", True)
    assert again.classnames == ["temple", "flower"]
    assert again.info == model.info | {"dataset": "webdataset shards"}  # no path of the machine it was trained on
    with pytest.raises(ZooError, match="is not a Hub repo id"):
        dcp_zoo.push_to_hub(model, "me/../photos")


def test_a_refusal_of_the_hub_is_explained(folder, monkeypatch):
    def create_repo(*args, **kwargs):
        response = SimpleNamespace(status_code=403, headers={}, request=None)
        raise huggingface_hub.errors.HfHubHTTPError("no", response=response)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    with pytest.raises(ZooError, match=f"denies access to our-org/{MINI}: log in with `hf auth login`"):
        publish.publish(publish.prepare(folder, "our-org"))
