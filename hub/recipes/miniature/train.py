"""Train the miniature CLIP from scratch: `python hub/recipes/miniature/train.py --help`."""

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import open_clip
import torch
import typer
from align import align
from clip_names import ClipNames, agreement, read_clip_names
from images import cache_features, load_images
from phrases import Phrases, make_phrases, minilm, read_nouns
from safetensors.torch import load_file, save_file
from stem import load_stem
from text import init_tokens, train_text
from timm.data import ImageNetInfo
from torch import Tensor, nn
from vision import SCALE, VisionData, encode_maps, init_from_classifier, train_vision

from dcp_zoo.backbone.mini import MINI_CFG, Stem, build_mini_clip


@dataclass(frozen=True)
class Recipe:
    """(steps, batch, learning rate) of the four stages; `pixels` is the side of the stored images."""

    text: tuple[int, int, float]
    vision: tuple[int, int, float]
    align: tuple[int, int, float]
    polish: tuple[int, int, float]
    views: int
    pixels: int = 64


RECIPES = {
    "full": Recipe(
        text=(5000, 256, 1.5e-3), vision=(600, 128, 1e-3), align=(150, 128, 4e-4), polish=(2000, 128, 1e-3), views=3
    ),
    "refine": Recipe(
        text=(3000, 256, 1e-3), vision=(1200, 128, 1e-3), align=(0, 128, 4e-4), polish=(1800, 128, 1e-3), views=3
    ),
    "smoke": Recipe(text=(4, 8, 1e-3), vision=(4, 8, 1e-3), align=(4, 8, 1e-4), polish=(4, 8, 1e-3), views=2),
}


@dataclass
class Sources:
    """The teachers of the miniature."""

    stem: Stem
    teacher: nn.Linear
    clip: ClipNames  # with the teacher's classes
    glosses: dict[str, str]  # of these classes, by any of their names: "noun, synonym, ...: definition"
    embed: Callable[[list[str]], Tensor]


def pretrained_sources(clip_text: Path) -> Sources:
    stem, teacher = load_stem()
    names = list(open_clip.IMAGENET_CLASSNAMES)
    imagenet = ImageNetInfo()
    clip = read_clip_names(clip_text)
    glosses = [f"{name}, {imagenet.index_to_description(i, detailed=True)}" for i, name in enumerate(names)]
    shared = {name for name, count in Counter(clip.classes).items() if count > 1}  # a crane is a bird or a machine
    by_name = dict(zip(clip.classes, glosses, strict=True)) | dict(zip(names, glosses, strict=True))
    return Sources(stem, teacher, clip, {n: g for n, g in by_name.items() if n not in shared}, minilm)


def cached(path: Path, make: Callable[[], Phrases]) -> Phrases:
    """The result of `make`, cached at `path`."""
    if not path.exists():
        torch.save(make(), path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return torch.load(path, weights_only=False)  # written by this script


@torch.no_grad()
def name_features(clip: open_clip.CLIP, names: list[str]) -> Tensor:
    """Normalised text features (C, embed) of "a photo of a {}."."""
    tokens = open_clip.tokenize([f"a photo of a {name}." for name in names])
    return clip.encode_text(tokens.to(clip.logit_scale.device), normalize=True)


@torch.inference_mode()
def zero_shot_accuracy(clip: open_clip.CLIP, maps: Tensor, labels: Tensor, names: list[str]) -> float:
    """Zero-shot top-1 accuracy on cached stem features (N, 352, h, w) of images."""
    device = clip.logit_scale.device
    widen = clip.visual.conv1.stem.widen
    images = torch.cat([encode_maps(clip, widen(m.to(device).float())) for m in maps.split(250)])
    return ((images @ name_features(clip, names).T).argmax(1).cpu() == labels).float().mean().item()


def load_start(clip: open_clip.CLIP, path: Path) -> None:
    """Load weights; projections of another width are left out, as the text and vision stages begin with new
    ones."""
    own = clip.state_dict()
    state = {name: t for name, t in load_file(path).items() if t.shape == own[name].shape}
    clip.load_state_dict(own | state)


def export(clip: open_clip.CLIP, path: Path) -> None:
    state = {name: t.half().contiguous().cpu() for name, t in clip.state_dict().items()}
    save_file(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_data(images: Path, recipe: Recipe, sources: Sources, size: int, cache: Path) -> VisionData:
    pixels, labels, names = load_images(images, "train", recipe.pixels)
    maps = cache_features(pixels, sources.stem, size, recipe.views, cache, "train")
    return VisionData(maps, labels, names, sources.teacher, sources.clip.classes)


def train_towers(clip: open_clip.CLIP, data: VisionData, phrases: Phrases, recipe: Recipe, output: Path) -> None:
    """Run the four stages, resuming where they stopped."""

    def settings(stage: tuple[int, int, float]) -> dict:
        return dict(zip(("steps", "batch", "lr"), stage, strict=True)) | {"output": output}

    name_lists = data.teacher_names, data.label_names
    train_text(clip, phrases, **settings(recipe.text))
    targets = [phrases.of(names).to(clip.logit_scale.device) for names in name_lists]
    train_vision("vision", clip, data, *targets, **settings(recipe.vision), first=True)
    align(clip, data, phrases, **settings(recipe.align))
    features = [name_features(clip, names) for names in name_lists]
    train_vision("polish", clip, data, *features, **settings(recipe.polish))


def train(
    images: Path,
    wordnet: Path,
    output: Path,
    recipe: Recipe,
    sources: Sources,
    cfg: dict = MINI_CFG,
    start: Path | None = None,
) -> float:
    """Run or resume the complete training. Returns zero-shot top-1 accuracy on the validation images."""
    output.mkdir(parents=True, exist_ok=True)
    size = cfg["image_size"]
    cache = output / "features"
    data = load_data(images, recipe, sources, size, cache)
    phrases = cached(
        output / "phrases.pt",
        lambda: make_phrases(
            read_nouns(wordnet, sources.glosses, [*data.label_names, *sources.clip.names]), sources.clip, sources.embed
        ),
    )
    torch.manual_seed(0)
    clip = build_mini_clip(cfg=cfg)
    if start:
        load_start(clip, start)
    elif not (output / "text.pt").exists():
        init_tokens(clip, sources.embed)
        init_from_classifier(clip, data.teacher)
    clip.logit_scale.data.fill_(math.log(SCALE))
    clip.visual.conv1.stem.load_state_dict(sources.stem.state_dict())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clip.to(device)
    data.teacher.to(device)
    train_towers(clip, data, phrases, recipe, output)
    export(clip, output / "clip.safetensors")

    pixels, labels, names = load_images(images, "val", recipe.pixels)
    maps = cache_features(pixels, sources.stem, size, 1, cache, "val")
    top1 = zero_shot_accuracy(clip.eval(), maps, labels, names)
    held_out = agreement(name_features(clip, sources.clip.held_out).cpu(), sources.clip)
    metrics = {"val zero-shot top-1": top1, "images": len(labels), "held-out names": held_out}
    (output / "metrics.json").write_text(json.dumps(metrics))
    return top1


def main(
    images: Annotated[Path, typer.Option(help="DIR/train/CLASS/*.jpg and DIR/val/..., or parquet + classes.json.")],
    wordnet: Annotated[Path, typer.Option(help="WordNet's data.noun and index.noun, such as /usr/share/wordnet.")],
    clip_text: Annotated[Path, typer.Option(help="CLIP's vectors of names: an .npz with `name`, `source`, `vector`.")],
    output: Annotated[
        Path, typer.Option(help="Folder for caches, checkpoints, log.csv and clip.safetensors; run again to resume.")
    ],
    recipe: Annotated[
        str,
        typer.Option(help="full; refine: without align and shorter, for --start; smoke: a few steps, as a test."),
    ] = "full",
    start: Annotated[Path | None, typer.Option(help="Weights to continue from, such as the bundled ones.")] = None,
) -> None:
    """Train the miniature CLIP: text tower, vision tower, then both together."""
    for name in ("data.noun", "index.noun"):
        if not (wordnet / name).exists():
            raise typer.BadParameter(f"{wordnet} has no {name}: pass the folder of WordNet's dictionary.")
    top1 = train(images, wordnet, output, RECIPES[recipe], pretrained_sources(clip_text), start=start)
    typer.echo(f"zero-shot top-1 on the validation images: {top1:.1%}, weights: {output / 'clip.safetensors'}")


if __name__ == "__main__":
    typer.run(main)
