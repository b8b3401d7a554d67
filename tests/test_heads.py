"""Every head of the registry: what `info` says of it, and the run that its name alone stands for."""

from types import SimpleNamespace

import pytest

import dcp_zoo
from dcp_zoo.cli import main, train
from dcp_zoo.cli.show import describe_head
from dcp_zoo.train.recipes import Recipe
from dcp_zoo.zoo import registry


@pytest.mark.parametrize("name", dcp_zoo.list_pretrained())
def test_info_of_every_head(name):
    facts = describe_head(registry.get_head(name))
    assert facts["train it"] == f"dcp-zoo train --head {name} --data-root DIR"
    assert facts["size"].endswith("MB")
    assert Recipe.__dataclass_fields__.keys() <= facts["recipe"].keys()
    assert facts["licence"]
    assert facts["metrics"]
    if facts["dataset"] == "imagenet":
        assert facts["recipe"]["stop_epoch"] == 5


def test_the_size_of_a_planned_head_is_that_of_the_file(tmp_path):
    model = dcp_zoo.create_model("dcp_vitb16")
    model.calibrated = model.prompts["vision"].detach()[None].repeat(model.coupled, 1, 1)
    size = (model.save_pretrained(tmp_path) / "model.safetensors").stat().st_size
    assert describe_head(registry.get_head("dcp_vitb16.dtd-1shot"))["size"] == f"about {size / 1e6:.0f} MB"


@pytest.fixture
def trained(monkeypatch) -> dict:
    """`dcp-zoo train` up to its run: what it would train."""
    seen: dict = {}

    def plan(model, dataset, data_root, shots, seed, recipe, *args, **options):
        seen.update(head=(model, dataset, shots, seed), data_root=str(data_root), recipe=recipe)
        return SimpleNamespace(split=SimpleNamespace(note=""))

    def train_head(run, output, **options):
        seen["output"] = str(output)
        return None, {}

    monkeypatch.setattr(train, "plan", plan)
    monkeypatch.setattr(train, "train_head", train_head)
    return seen


def call(monkeypatch, *args: str) -> int:
    monkeypatch.setattr("sys.argv", ["dcp-zoo", "train", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_a_head_is_trained_from_its_name_alone(trained, monkeypatch):
    assert call(monkeypatch, "--head", "dcp_vitb32.imagenet-4shot-seed2", "--data-root", "D") == 0
    assert trained["head"] == ("dcp_vitb32", "imagenet", 4, 2)
    assert (trained["data_root"], trained["output"]) == ("D", "dcp_vitb32.imagenet-4shot-seed2")
    assert trained["recipe"] == Recipe(stop_epoch=5)
    assert call(monkeypatch, "--head", "dcp_vitl14.dtd-1shot", "--data-root", "D", "--lr", "0.1", "--output", "o") == 0
    assert (trained["recipe"], trained["output"]) == (Recipe(lr=0.1), "o")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--head", "dcp_vitb16.dtd-1shot", "--shots", "2"], "already says --shots"),
        (["--head", "dcp_vitb16.dtd-3shot"], "has no head 'dtd-3shot'"),
        (["--dataset", "digits"], "--output DIR"),
    ],
)
def test_contradictions_are_refused(trained, monkeypatch, capsys, args, message):
    assert call(monkeypatch, *args) == 2
    assert message in capsys.readouterr().err
    assert not trained
