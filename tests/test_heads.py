"""Every head of the registry: what `info` shows, and the training run defined by its name alone."""

from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch

import dcp_zoo
from dcp_zoo.cli.show import describe_head
from dcp_zoo.model._torch import skip_init
from dcp_zoo.model.config import PHRASE
from dcp_zoo.training.methods.table import chosen_recipe
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.zoo import registry


def test_info_of_every_head():
    for name in dcp_zoo.list_heads():
        facts = describe_head(registry.get_head(name))
        model, dataset, shots = facts["head"].split(".")[0], facts["dataset"], facts["shots"]
        assert (name, facts["seed"]) == (f"{model}.{dataset}-{shots}shot", 1)
        assert facts["train it"] == f"dcp-zoo train --head {name} --data-root DIR"
        assert {field.name for field in fields(Recipe)} <= facts["recipe"].keys(), name
        assert facts["recipe"]["coupling"] == "bidirectional", name
        if facts["status"] == "planned":
            assert "not trained" in facts["licence"], name
            assert "not measured" in facts["metrics"], name
        else:
            assert facts["licence"] == "apache-2.0", name
            assert all(50 < facts["metrics"][f"top1_{stats}"] < 100 for stats in ("stored", "batch")), name


def test_the_size_of_a_planned_head_is_that_of_the_file(tmp_path):
    with skip_init():
        model = dcp_zoo.create_model("dcp_vitb16", classnames=["cat"])
    with torch.no_grad():
        for p in model.parameters():
            p.zero_() if p.requires_grad else None
    model.stored_stats = torch.zeros(model.num_coupled, *model.prompts["vision"].shape)
    size = (model.save_pretrained(tmp_path) / "model.safetensors").stat().st_size
    assert describe_head(registry.get_head("dcp_vitb16.dtd-1shot"))["size"] == f"about {size / 1e6:.0f} MB"
    assert round(size / 1e6, 1) == registry.get_spec("dcp_vitb16").head_mb


def test_the_size_of_a_bundled_head_is_that_of_its_file():
    head = registry.get_head("dcp_mini.caltech101-1shot")
    size = (head.bundled_dir / "model.safetensors").stat().st_size
    assert describe_head(head)["size"] == f"{size / 1e6:.1f} MB"
    assert size > 1e6 * registry.get_spec("dcp_mini").head_mb  # the text probe


@pytest.fixture
def trained(monkeypatch) -> dict:
    """`dcp-zoo train` with the run itself replaced: records what it would train."""
    seen: dict = {}

    def load(dataset, data_root, *args):
        seen.update(data_root=str(data_root))
        return SimpleNamespace(name=dataset, note="", items=[])

    def plan(split, model, *args, shots, seed, recipe, changes, **options):
        chosen = chosen_recipe("dcp", model, split.name, shots, recipe).updated(changes)
        seen.update(head=(model, split.name, shots, seed), recipe=chosen)
        return SimpleNamespace(split=split)

    def train_head(run, output, options):
        seen["output"] = str(output)
        return SimpleNamespace(info={}), {}

    monkeypatch.setattr("dcp_zoo.cli.train.load_for_training", load)
    monkeypatch.setattr("dcp_zoo.training.planning.plan", plan)
    monkeypatch.setattr("dcp_zoo.training.run.train_head", train_head)
    return seen


def test_a_head_is_trained_from_its_name_alone(trained, run):
    run.ok("train", "--head", "dcp_vitb32.imagenet-4shot-seed2", "--data-root", "D")
    assert trained["head"] == ("dcp_vitb32", "imagenet", 4, 2)
    assert (trained["data_root"], trained["output"]) == ("D", "dcp_vitb32.imagenet-4shot-seed2")
    assert trained["recipe"] == Recipe(ctx_init=PHRASE, classifier="text-probe")
    run.ok("train", "--head", "dcp_vitl14.dtd-1shot", "--data-root", "D", "--set", "lr=0.1", "--output", "o")
    assert (trained["recipe"], trained["output"]) == (Recipe(lr=0.1, ctx_init=PHRASE, classifier="text-probe"), "o")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--head", "dcp_vitb16.dtd-1shot", "--shots", "2"], "already sets --shots"),
        (["--head", "dcp_vitb16.dtd-3shot"], "has no head 'dtd-3shot'"),
    ],
)
def test_contradictions_are_rejected(trained, run, args, message):
    assert message in run.refused("train", *args)
    assert not trained
