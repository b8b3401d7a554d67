"""The zoo's table: what it lists, what `info` shows, training by a head's name alone, and messages for
unknown names. New rows are covered here."""

import csv
import re
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import published
import pytest
import torch
from helpers import offline
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor
from trees import picture, write_listed

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.cli.show import describe_head
from dcp_zoo.data import DATASETS
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import PHRASE, WEIGHTS_NAME
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.zoo import registry
from dcp_zoo.zoo.registry import all_heads, get_head, trained_heads
from dcp_zoo.zoo.specs import MODELS, SIZES


def test_lists_and_sizes():
    assert dcp_zoo.list_models("*vit*") == ["dcp_vitb16", "dcp_vitb32", "dcp_vitl14", "dcp_vitl14_336"]
    assert dcp_zoo.list_models(["dcp_mini", "dcp_vitb*"], exclude_filters="*32") == ["dcp_mini", "dcp_vitb16"]
    assert "dcp_vitb16.dtd-4shot" in dcp_zoo.list_models(include_tags=True)
    assert dcp_zoo.list_models(pretrained=True, include_tags=False) == ["dcp_mini"]
    assert dcp_zoo.list_models(module="vision_transformer") == []
    for size, name in SIZES.items():
        assert dcp_zoo.is_model(size)
        assert dcp_zoo.model_entrypoint(size).__name__ == name
        assert dcp_zoo.get_pretrained_cfg(f"{size}.dtd-4shot")["architecture"] == name
    assert not dcp_zoo.is_model("tiny")


@pytest.mark.scripts
def test_accuracies_are_the_published_ones():
    """Each figure of the table, and those that are missing."""
    with published.RESULTS.open() as file:
        rows = {
            row["model"]: [float(row[name]) for name in published.NAMES if row[name]] for row in csv.DictReader(file)
        }
    for name, spec in MODELS.items():
        tops = rows.get(name, [])
        assert spec.imagenet == (round(tops[0], 1) if tops else None), name
        assert spec.zero_shot == (round(sum(tops) / 10, 1) if len(tops) == 10 else None), name
        assert bool(tops) == bool(spec.accuracy_source), name


@pytest.mark.parametrize("accuracy", ["zero_shot", "imagenet"])
def test_a_model_is_on_the_frontier_if_none_as_cheap_is_as_accurate(accuracy):
    """Whatever the licence, and among the open ones."""
    for licenses in ((), published.OPEN_LICENSES):
        rated = [s for s in MODELS.values() if getattr(s, accuracy) and (not licenses or s.license in licenses)]
        best = published.frontier(accuracy, licenses)
        for spec in rated:
            as_cheap = (getattr(s, accuracy) for s in rated if s.gflops <= spec.gflops and s is not spec)
            assert (spec in best) == all(value < getattr(spec, accuracy) for value in as_cheap), spec.name
    best = [spec.name for spec in published.frontier("zero_shot", published.OPEN_LICENSES)]
    assert list(SIZES) == ["small", "medium", "large"]  # the larger, the more accurate
    assert [best.index(name) for name in SIZES.values()] == sorted(best.index(name) for name in SIZES.values())


def test_pretrained_means_can_be_loaded(monkeypatch):
    """CLIP's weights are pinned by whole commits, as a branch may move. Each seed has a head of its own."""
    assert all(re.fullmatch("[0-9a-f]{40}", spec.clip_revision) for spec in MODELS.values() if spec.clip_revision)
    bundled, published, planned = (dcp_zoo.list_heads(status=s) for s in ("bundled", "published", "planned"))
    assert {*bundled, *published} == trained_heads().keys()
    clips = {f"{name}.clip" for name in MODELS}
    assert set(dcp_zoo.list_pretrained()) == {*bundled, *published, *clips}
    assert clips < set(dcp_zoo.list_models(include_tags=True))
    for name, spec in MODELS.items():
        cfg = dcp_zoo.get_pretrained_cfg(f"{name}.clip")
        place = f"{spec.clip_repo}@{spec.clip_revision}" if spec.clip_revision else spec.clip_repo
        assert cfg.get("hf_hub_id") == place
        assert place or Path(cfg["file"]).exists()
    assert sorted(bundled + published + planned) == sorted(dcp_zoo.list_heads())
    assert len(planned) == 55 * (len(MODELS) - 1)  # not for the miniature
    for head in (all_heads()[name] for name in planned):
        assert (head.metrics, head.revision, head.sha256, head.license) == ({}, None, None, None)
    with pytest.raises(ZooError, match="bundled, published, planned"):
        dcp_zoo.list_heads(status="trained")
    assert (get_head("dcp_vitb16.dtd-4shot-seed2").seed, get_head("dcp_vitb16.dtd-4shot").seed) == (2, 1)
    for alias in ("dcp_vitb16.dtd-04shot", "dcp_vitb16.dtd-4shot-seed02", "dcp_vitb16.dtd-0shot"):
        with pytest.raises(ZooError):
            get_head(alias)
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "us")
    assert get_head("dcp_vitb16.dtd-4shot-seed3").place[0] == "us/dcp_vitb16.dtd-4shot-seed3"


def test_names_without_weights_say_why_and_what_there_is():
    """Those of unknown models and heads the nearest; the head of a whole dataset is asked for, though one of
    a part exists."""
    assert dcp_zoo.get_pretrained_cfg("dcp_mini.oxford_flowers-16shot")["num_classes"] == 102
    for name, pretrained, message in (
        ("dcp_vitb61", False, "Nearest: dcp_vitb16"),
        ("dcp_vitb16", "imagnet-16shot", "Nearest: imagenet-16shot"),
        ("dcp_vitb16.dtd-4shot-seed1", True, "dtd-4shot"),
        ("dcp_vitb16.dtd-4shot-seed4", True, "dtd-4shot"),
        ("dcp_vitb16.imagenet-16shot", "dtd-4shot", "pass only one"),
        ("web:dcp_vitb16", True, "hf-hub:org/repo"),
        ("ViT-B-32", "clip", "open_clip's ViT-B-32 is open_clip:ViT-B-32/TAG, with a tag of open_clip.list_pretrain"),
        ("dcp_mini", "oxford_flowers-16shot", "^dcp_mini.oxford_flowers-16shot may be on the Hub, but it"),
    ):
        with offline(), pytest.raises(ZooError, match=message):
            dcp_zoo.create_model(name, pretrained)


def test_training_transform_works_on_tensors_as_on_pil_images():
    """With the same draws: equal for a PIL image and its tensor, and within 2 of 255 levels of PIL's
    filter."""
    train = dcp_zoo.create_transform("dcp_vitb16", is_training=True)
    to_tensor, crop, flip, *rest = train.transforms
    by_pil = v2.Compose([crop, flip, to_tensor, *rest])
    image = Image.effect_noise((400, 300), 60).convert("RGB")
    for seed in range(3):
        results = []
        for transform, given in ((train, image), (train, pil_to_tensor(image)), (by_pil, image)):
            torch.manual_seed(seed)
            results.append(transform(given))
        assert torch.equal(results[0], results[1])
        levels = 255 * (results[0] - results[2]).abs() * torch.tensor(rest[-1].std).view(3, 1, 1)
        assert levels.max() < 2.5
        assert levels.mean() < 0.05


def test_info_of_every_head():
    for name in dcp_zoo.list_heads():
        facts = describe_head(registry.get_head(name))
        model, dataset, shots = facts["head"].split(".")[0], facts["dataset"], facts["shots"]
        assert (name, facts["seed"]) == (f"{model}.{dataset}-{shots}shot", 1)
        assert facts["train it"] == f"dcp-zoo train --head {name} --data-root DIR"
        assert facts["recipe"]["coupling"] == "bidirectional", name
        if facts["status"] == "planned":
            assert {field.name for field in fields(Recipe)} <= facts["recipe"].keys(), name
            assert not facts["licence"], name
            assert not facts["metrics"], name
        else:
            head = get_head(name)
            assert head.revision or sha256_of(head.bundled_dir / WEIGHTS_NAME) == head.sha256
            assert facts["licence"] == "apache-2.0", name
            assert len(facts["classes"]) > 1, name
            assert all(50 < facts["metrics"][f"top1_{stats}"] < 100 for stats in ("stored", "batch")), name


def test_a_head_is_trained_from_its_name_alone(run, tmp_path, monkeypatch):
    """The data are loaded and the run is planned; only the training itself is left out."""
    monkeypatch.chdir(tmp_path)
    write_listed(tmp_path, "eurosat", make=picture)
    monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], counts=(20, 10, 10)))
    seen: list = []

    def train_head(run, output, options):
        seen.append((run, str(output)))
        return SimpleNamespace(info={}, text_probe=None, cannot_reject=""), {}

    monkeypatch.setattr("dcp_zoo.training.run.train_head", train_head)
    for args, lr in (((), 0.0035), (("--set", "lr=0.1", "--output", "o"), 0.1)):
        run.ok("train", "--head", "dcp_vitb32.eurosat-1shot-seed2", "--data-root", ".", *args)
        planned, output = seen.pop()
        assert (planned.model, planned.split.name, planned.shots, planned.seed) == ("dcp_vitb32", "eurosat", 1, 2)
        assert planned.recipe == Recipe(lr=lr, ctx_init=PHRASE, classifier="text-probe")
        assert output == (args[-1] if args else "dcp_vitb32.eurosat-1shot-seed2")
