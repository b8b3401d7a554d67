"""`dcp-zoo cache`: what the caches hold, and what of it is removed."""

import json
from pathlib import Path

import pytest
from helpers import use_endpoint
from safetensors.torch import save_file
from torch import zeros

from dcp_zoo.deploy.onnx_cache import FOLDER
from dcp_zoo.files import cache_folder
from dcp_zoo.model.config import CONFIG_NAME
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.registry import MODELS

CLIP, HEAD = MODELS["dcp_datacomp_b32_256"].clip_repo, "me/head"
OLD, NEW, PINNED = (letter * 40 for letter in "abc")


def add(cache: Path, repo: str, commit: str, ref: str = "", **files: bytes) -> Path:
    """A revision in the layout of the Hub's cache: blobs, a snapshot that links to them, and perhaps a reference."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (snapshot := folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = folder / "blobs" / f"{commit}{name}"
        blob.write_bytes(content)
        (snapshot / name.replace("__", ".")).symlink_to(blob)
    if ref:
        (folder / "refs" / ref).write_text(commit)
    return folder


@pytest.fixture
def caches(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The Hub's cache with a CLIP in two revisions, a head in a pinned one, and another program's model; our own cache
    with features, exports of this version and another, and a folder that is the user's."""
    hub, own = tmp_path / "hub", tmp_path / "own"
    use_endpoint(monkeypatch, "http://127.0.0.1:9", hub)
    monkeypatch.setenv("DCP_ZOO_CACHE", str(own))
    save_file({"a": zeros(100_000)}, tmp_path / "clip")
    for commit, ref in ((OLD, ""), (NEW, "main")):
        clip = add(hub, CLIP, commit, ref, open_clip_model__safetensors=(tmp_path / "clip").read_bytes())
    (clip / "blobs" / "x.incomplete").write_bytes(bytes(300_000))
    killed = hub / f"models--{MODELS['dcp_vitb16'].clip_repo.replace('/', '--')}" / "blobs"  # in its first download
    killed.mkdir(parents=True)
    (killed / "y.incomplete").write_bytes(bytes(200_000))
    bundled = registry.WEIGHTS / "dcp_mini.caltech101-16shot"
    add(hub, HEAD, PINNED, config__json=(bundled / CONFIG_NAME).read_bytes())
    add(hub, HEAD, NEW[:-1] + "d", "main", config__json=(bundled / CONFIG_NAME).read_bytes())
    entry = registry.HeadEntry("dcp_mini.caltech101-16shot", "published", "me", PINNED)
    monkeypatch.setattr("dcp_zoo.cli.cache.trained_heads", lambda: {entry.name: entry})
    bert = add(hub, "bert/bert", OLD[:-1] + "e", "main", config__json=json.dumps({"model_type": "bert"}).encode())
    (bert / "blobs" / "z.incomplete").write_bytes(b"another program's")
    for name in ("features", FOLDER, "onnx-0.0.1"):
        (cache_folder(name) / "file").write_bytes(bytes(200_000))
    (own / "onnx-mine").mkdir()
    (own / "onnx-mine/file").write_text("mine")
    return hub, own


def test_what_is_listed(caches, run):
    out = run.ok("cache", "list")
    assert CLIP in out
    assert "dcp_datacomp_b32_256" in out
    assert HEAD in out
    assert "features of images" in out
    assert "0.8 MB" in out  # both revisions of the CLIP
    assert "bert" not in out
    assert "mine" not in out
    assert all(str(place) in out for place in caches)


def test_only_what_is_named_is_removed(caches, run):
    hub, own = caches
    assert "0.00 GB are free again" in run.ok("cache", "remove", "small", "features", "features")
    assert not (hub / f"models--{CLIP.replace('/', '--')}").exists()
    assert not (own / "features").exists()
    assert len(list(hub.glob("models--*"))) == 3
    assert (own / FOLDER / "file").exists()
    message = f"do not have {FOLDER}x. Nearest: {FOLDER}, onnx-0.0.1. All: dcp-zoo cache list"
    assert message in run.refused("cache", "remove", f"{FOLDER}x", FOLDER)
    assert (own / FOLDER / "file").exists()  # nothing is removed where a name is wrong
    assert f"do not have {MODELS['dcp_vitb16'].clip_repo}" in run.refused("cache", "remove", "dcp_vitb16")


def test_pruning_leaves_what_is_used(caches, run):
    hub, own = caches
    out = run.ok("cache", "prune")
    assert out.count("Removed") == 4
    assert "Removed x.incomplete: 0.3 MB" in out
    assert [path.name for path in hub.rglob("*.incomplete")] == ["z.incomplete"]
    left = {path.name for path in hub.glob("*/snapshots/*")}
    assert left == {NEW, PINNED, NEW[:-1] + "d", OLD[:-1] + "e"}
    assert {path.name for path in own.iterdir()} == {"features", FOLDER, "onnx-mine"}
    assert run.ok("cache", "prune") == "0.00 GB are free again.\n"


def test_without_caches(tmp_path, monkeypatch, run):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "none")
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "nothing"))
    assert "0.00 GB" in run.ok("cache", "list")
    assert "0.00 GB are free" in run.ok("cache", "prune")
    assert not (tmp_path / "nothing").exists()


def test_backups_leave_the_cache_out(tmp_path, monkeypatch):
    """https://bford.info/cachedir: the first 43 bytes; a folder that cannot be made is no error here."""
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path))
    assert (cache_folder("features") / "CACHEDIR.TAG").read_bytes()[
        :43
    ] == b"Signature: 8a477f597d28d172789f06886806bc55"
    (tmp_path / "file").touch()
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "file"))
    assert cache_folder("features") == tmp_path / "file/features"
