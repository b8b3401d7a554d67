"""Every head of the registry: what `info` shows, and the training run defined by its name alone."""

from dataclasses import fields, replace
from types import SimpleNamespace

import torch
from trees import picture, write_listed

import dcp_zoo
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.cli.show import describe_head
from dcp_zoo.data import DATASETS
from dcp_zoo.heads.config import PHRASE
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.zoo import registry


def test_info_of_every_head():
    for name in dcp_zoo.list_heads():
        facts = describe_head(registry.get_head(name))
        model, dataset, shots = facts["head"].split(".")[0], facts["dataset"], facts["shots"]
        assert (name, facts["seed"]) == (f"{model}.{dataset}-{shots}shot", 1)
        assert facts["train it"] == f"dcp-zoo train --head {name} --data-root DIR"
        assert facts["recipe"]["coupling"] == "bidirectional", name
        if facts["status"] == "planned":
            assert {field.name for field in fields(Recipe)} <= facts["recipe"].keys(), name
            assert "not trained" in facts["licence"], name
            assert "not measured" in facts["metrics"], name
        else:
            assert facts["licence"] == "apache-2.0", name
            assert facts["classes"], name
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


def test_a_head_is_trained_from_its_name_alone(run, tmp_path, monkeypatch):
    """The data are loaded and the run is planned; only the training itself is left out."""
    monkeypatch.chdir(tmp_path)
    write_listed(tmp_path, "eurosat", make=picture)
    monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], counts=(20, 10, 10)))
    seen: list = []

    def train_head(run, output, options):
        seen.append((run, str(output)))
        return SimpleNamespace(info={}), {}

    monkeypatch.setattr("dcp_zoo.training.run.train_head", train_head)
    for args, lr in (((), 0.0035), (("--set", "lr=0.1", "--output", "o"), 0.1)):
        run.ok("train", "--head", "dcp_vitb32.eurosat-1shot-seed2", "--data-root", ".", *args)
        planned, output = seen.pop()
        assert (planned.model, planned.split.name, planned.shots, planned.seed) == ("dcp_vitb32", "eurosat", 1, 2)
        assert planned.recipe == Recipe(lr=lr, ctx_init=PHRASE, classifier="text-probe")
        assert output == (args[-1] if args else "dcp_vitb32.eurosat-1shot-seed2")
