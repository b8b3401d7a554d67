"""`hub/build.py` from nothing to a full registry, on small data and a Hub that takes uploads; and what it refuses."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import build
import publish
import pytest
import trees
from PIL import Image
from shared import CommandLine

import dcp_zoo
from dcp_zoo.benchmark import store
from dcp_zoo.data import DATASETS, list_datasets, packaged
from dcp_zoo.data.packaged import Archive
from dcp_zoo.zoo import registry

NAMES = ["red", "green", "blue"]
DEAD = Archive("http://127.0.0.1:9/images.tar")
COUNTS = {"imagenet": (6, 0, 3), "fgvc_aircraft": (3, 3, 3)}


@pytest.fixture
def run(monkeypatch, capsys) -> CommandLine:
    return CommandLine(monkeypatch, capsys, build.app)


def draw(path: Path) -> None:
    """A picture, with a colour of its own for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(path.stem.encode()) * 37
    Image.new("RGB", (32, 32), (number % 256, number * 7 % 256, number * 3 % 256)).save(path)


@pytest.fixture
def small(tmp_path, manifest, monkeypatch) -> Iterator[Path]:
    """The data of a protocol with four datasets, of each layout, with three classes and a few images each.
    The miniature trains for four steps."""
    full = dict(DATASETS)
    for name in set(list_datasets()) - {"imagenet", "caltech101", "fgvc_aircraft", "oxford_pets"}:
        del DATASETS[name]
    put = monkeypatch.setattr
    put(packaged, "_class_names", lambda: dict.fromkeys((spec.names for spec in full.values()), NAMES))
    put(packaged, "split_rows", lambda name: None)
    put(packaged, "drawn", lambda *args: None)
    put(packaged, "wnid_names", lambda: dict(zip(trees.WNIDS, NAMES, strict=True)))
    put(trees, "WNIDS", trees.WNIDS[:3])
    for name in list_datasets():
        counts = COUNTS.get(name, (6, 3, 3))
        DATASETS[name] = replace(full[name], num_classes=3, counts=counts, archives=(DEAD,))
        trees.write_tree(tmp_path / "DATA", name, draw)
    mini = registry.MODELS["dcp_mini"]  # every step has all images, so that the loss falls
    short = replace(mini, recipe=mini.recipe | {"epochs": 4, "batch_size": 4})
    monkeypatch.setitem(registry.MODELS, "dcp_mini", short)
    yield tmp_path
    monkeypatch.undo()
    DATASETS.clear()
    DATASETS.update(full)  # in their order


def arguments(folder: Path, *more: str) -> list[str]:
    shared = ["--data-root", str(folder / "DATA"), "--output", str(folder / "BUILD"), "--shots", "1", "--seeds", "1"]
    return ["--models", "dcp_mini", *shared, *more]


def check_full(hub, folder: Path, monkeypatch, datasets: list[str]) -> None:
    """Every head is published once, pinned, and loads from the Hub by its pin."""
    names = [f"dcp_mini.{dataset}-1shot" for dataset in datasets]
    assert hub.published() == {f"our-org/{name}": 1 for name in names} | {"our-org/dcp-zoo-index": len(names)}
    manifest = json.loads((folder / "checkout/dcp_zoo/zoo/heads.json").read_text())
    assert sorted(manifest) == sorted(names)
    heads = {name: registry.HeadEntry(name, **entry) for name, entry in manifest.items()}
    monkeypatch.setattr(registry, "all_heads", lambda: heads)
    name = names[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dcp_zoo.create_model(name, True)
    assert model.classnames == NAMES
    assert model.info["metrics"] == heads[name].metrics
    assert "top1_no_classifier" in heads[name].metrics


def test_a_dry_run_says_what_a_build_takes(small, uploads, run, monkeypatch):
    out = run.ok(*arguments(small, "--dry-run"))
    assert uploads.requests == []
    assert not (small / "BUILD").exists()
    assert "Downloads: none, all datasets are here." in out
    assert "GB for 4 heads" in out
    monkeypatch.setattr("build.gigabytes", lambda specs: 1.0)
    out = run.ok("--models", "dcp_mini", "--datasets", "fgvc_aircraft", "--dry-run")
    assert "Downloads: fgvc_aircraft, 1.0 GB" in out  # nothing else is needed
    assert "Pass --models MODEL, --data-root DIR, --output DIR: python hub/build.py" in run()[2]


@pytest.mark.scripts
def test_a_build_survives_stops_and_a_busy_hub(small, uploads, run, monkeypatch):
    """From nothing to a full registry; a build that is finished asks for nothing."""
    few = ("--org", "our-org", "--datasets", "caltech101,fgvc_aircraft")
    write, few_only = store.write_json, arguments(small, *few)
    uploads.faults = [("/commit/main", 429), ("/commit/main", 0)]
    for kind in ("results", "published"):  # while it trains, and while it publishes

        def stop(path: Path, content: object, kind: str = kind) -> None:
            write(path, content)
            if path.parent.name == kind:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store, "write_json", stop)
            assert run(*few_only)[0] == 130
    assert "2 published." in run.ok(*few_only)
    check_full(uploads, small, monkeypatch, ["caltech101", "fgvc_aircraft"])
    requests = len(uploads.requests)
    assert "2 published." in run.ok(*few_only)
    assert len(uploads.requests) == requests


def result(stored: float = 70.0, batch: float = 70.5, **changes: object) -> dict:
    entry = {"images": 1000}
    return {
        "results": [entry | {"stats": "stored", "top1": stored}, entry | {"stats": "batch", "top1": batch}],
        "info": {"first_loss": 2.0, "last_loss": 0.5},
        "split_sha256": "split",
        "head_sha256": "head",
    } | changes


INFO = dict.fromkeys(("dataset", "shots", "seed", "recipe", "split_sha256", "subset_sha256"), "known")
RELEASE = publish.Release(Path(), registry.HeadEntry("dcp_mini.dtd-1shot"), "org/head", "head", None, INFO, "mit")


@pytest.mark.scripts
def test_gates():
    zero_shot = {"results": [{"images": 1000, "top1": 69.0, "stats": ""}], "split_sha256": "split"}
    for change, reason in (
        ({}, ""),
        ({"stored": 65.0, "batch": 65.0}, ""),  # within 2 points and chance
        ({"stored": 64.0, "batch": 64.0}, "is over 4.9 percentage points below zero-shot CLIP's 69.00"),
        ({"batch": 74.5}, "over 3.8 percentage points apart"),
        ({"info": {"first_loss": 1.0, "last_loss": float("nan")}}, "not finite"),
        ({"head_sha256": "other"}, "not the one that was measured"),
        ({"split_sha256": "other"}, "tested on other images"),
    ):
        found = build.refusals(result(**change), zero_shot, RELEASE, "")
        assert [reason in text for text in found] == ([True] if reason else []), found
