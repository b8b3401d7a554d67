"""What trials take, before they start: hours by a step that is measured on this machine, downloads and disk
space."""

import http.client
import urllib.request
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.benchmark.plan import PROTOCOLS, Settings, Trial, read_split
from dcp_zoo.data import DatasetSpec, find_spec
from dcp_zoo.data.download import AGENT
from dcp_zoo.errors import ZooError
from dcp_zoo.features.device import autocast, fastest, pick_device, pick_precision, seconds_per_image
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.training.loop import build_optimizer
from dcp_zoo.training.recipes import batch_sizes, default_recipe
from dcp_zoo.zoo.build import plain_clip
from dcp_zoo.zoo.specs import get_spec


class Pace(NamedTuple):
    """Seconds that a model takes on this machine."""

    image: float  # to encode an image
    step: float  # of DCP's training, apart from its classes
    per_class: float  # of a step, for each class


@cache
def pace(model: str, device: str = "auto", precision: str = "float32") -> Pace:
    """The pace of a model with random weights, measured in seconds: nothing but some tokenizers is
    downloaded."""
    place = pick_device(device)
    precision = pick_precision(precision, model, place)
    recipe = default_recipe(model)
    few = 4  # class names
    many = 44

    with seeded(0, place):
        clip = plain_clip(model, with_weights=False).to(place)
        size = clip.pretrained_cfg["input_size"]
        images = torch.randn(recipe.batch_size, *size, device=place)
        labels = torch.arange(len(images), device=place) % few

        def step_time(classes: int) -> float:
            head = DCP(clip, [f"class {i}" for i in range(classes)], recipe.config).train()
            parameters = [p for p in head.parameters() if p.requires_grad]
            optimizer = build_optimizer(recipe, parameters)

            def step() -> None:
                with autocast(place, precision):
                    loss = F.cross_entropy(head(images), labels)
                torch.autograd.backward(loss, inputs=parameters)
                optimizer.step()

            return fastest(step, place)

        image = seconds_per_image(clip.read, size, place, precision, recipe.batch_size)
        fewest = step_time(few)
        most = step_time(many)
    per_class = max(0.0, (most - fewest) / (many - few))
    return Pace(image, max(0.0, fewest - few * per_class), per_class)


def estimated_seconds(trials: Sequence[Trial], pace: Pace, data_root: Path | None = None) -> float:
    """What trials of one model take at this pace, as the sum over all. Methods that train by steps count as
    DCP, and fits to features are not counted. Frozen features of test images are computed once for all.
    ZooError for images that cannot be counted."""
    tested = {name for trial in trials for name in trial.targets or (trial.dataset,)}
    total = pace.image * sum(sizes(name, data_root)[1] for name in tested)
    for trial in trials:
        num_classes, _ = sizes(trial.dataset, data_root)
        classes = -(-num_classes // len(PROTOCOLS[trial.protocol].parts))
        images = trial.shots * classes
        total += pace.image * 2 * images  # they and their mirror images
        recipe: Any = trial.recipe.with_epochs(images, classes)
        steps = 0.0
        if recipe.is_trained:
            steps = recipe.num_epochs * len(batch_sizes(images, recipe.batch_size, recipe.drop_last))
            tests = sum(sizes(name, data_root)[1] for name in trial.targets or (trial.dataset,))
            total += pace.image * (images + tests)  # by its own prompts
        elif hasattr(recipe, "steps"):  # of a larger batch than the one that was measured
            steps = recipe.steps * recipe.batch_size / default_recipe(trial.model).batch_size
        total += steps * (pace.step + classes * pace.per_class)
    return total


def sizes(dataset: str, data_root: Path | None) -> tuple[int, int]:
    """The numbers of classes and test images, by the table of datasets or else as they are read."""
    spec = find_spec(dataset)
    if spec.counts and spec.num_classes:
        return spec.num_classes, spec.counts[2]
    split = read_split(dataset, data_root)
    return len(split.classnames), len(split.test)


def costs(trials: Sequence[Trial], missing: Sequence[DatasetSpec], settings: Settings) -> Iterator[str]:
    """What trials take, in lines: disk space, downloads of the missing datasets and of CLIP, and hours by a
    step that is measured now."""
    specs = [get_spec(name) for name in dict.fromkeys(trial.model for trial in trials)]
    size = "of unknown size"
    downloaded = gigabytes(missing)
    if downloaded is not None:
        size = f"{downloaded:.1f} GB"
        weights = sum(4 * (spec.parameters or 0) / 1e3 for spec in specs if spec.clip)
        yield f"Disk: {2 * downloaded + weights:.1f} GB at most, as archives stay until they are unpacked."
    yield f"Downloads: {', '.join(spec.name for spec in missing) or 'no datasets'}, {size}."
    clips = ", ".join(f"{spec.name} {spec.download}" for spec in specs if spec.clip)
    if clips:
        yield f"Weights of CLIP: {clips}, if not in the cache."
    for spec in specs:
        yield hours_text(spec.name, [trial for trial in trials if trial.model == spec.name], settings)


def hours_text(model: str, trials: Sequence[Trial], settings: Settings) -> str:
    """How long the trials of a model take here, one after the other."""
    try:
        measured = pace(model, settings.device, settings.precision)
        hours = estimated_seconds(trials, measured, settings.data_root) / 3600
    except ZooError as error:
        return f"Time of {model}: not measured. {error}"
    step = measured.step + 100 * measured.per_class
    each = f"a training step with 100 classes takes {step:.2g} s here, and an image {measured.image:.2g} s"
    return f"Time of {model}: about {hours:.1f} hours for {len(trials)} trials, one after the other; {each}."


def gigabytes(specs: Sequence[DatasetSpec]) -> float | None:
    """What the sources say they would send; None if one of them does not answer."""
    total = 0
    try:
        for spec in specs:
            for archive in spec.archives:
                request = urllib.request.Request(archive.url, headers=AGENT, method="HEAD")
                with urllib.request.urlopen(request, timeout=30) as answer:
                    total += int(answer.headers["Content-Length"])
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return None
    return total / 1e9
