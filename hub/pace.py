"""What trials take, before they start: seconds by a step that is measured on this machine, and downloads."""

import http.client
import time
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.benchmark import PROTOCOLS, Trial
from dcp_zoo.data import DatasetSpec, find_spec
from dcp_zoo.data.download import AGENT
from dcp_zoo.data.packaged import Archive
from dcp_zoo.errors import ZooError
from dcp_zoo.features.device import autocast, pick_device, pick_precision
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.training.loop import build_optimizer
from dcp_zoo.training.recipes import batch_sizes, default_recipe
from dcp_zoo.zoo.build import plain_clip


class Pace(NamedTuple):
    """Seconds that a model takes on this machine."""

    image: float  # to encode an image
    step: float  # of DCP's training, apart from its classes
    per_class: float  # of a step, for each class


def pace(model: str, device: str = "auto", precision: str = "float32") -> Pace:
    """The pace of a model with random weights, measured in seconds: nothing but some tokenizers is
    downloaded."""
    place = pick_device(device)
    precision, recipe = pick_precision(precision, model, place), default_recipe(model)
    few, many = 4, 44  # class names

    def seconds(call: Callable[[], object]) -> float:
        times = []
        for _ in range(3):  # the first takes longer, and others where the machine is busy
            started = time.perf_counter()
            call()
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            times.append(time.perf_counter() - started)
        return min(times)

    with seeded(0, place):
        clip = plain_clip(model, with_weights=False).to(place)
        images = torch.randn(recipe.batch_size, *clip.pretrained_cfg["input_size"], device=place)
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

            return seconds(step)

        with torch.no_grad(), autocast(place, precision):
            image = seconds(lambda: clip.read(images)) / len(images)
        fewest, most = step_time(few), step_time(many)
    per_class = max(0.0, (most - fewest) / (many - few))
    return Pace(image, max(0.0, fewest - few * per_class), per_class)


def estimated_seconds(trial: Trial, pace: Pace) -> float:
    """What a trial on a dataset of the table takes at this pace; other methods that train by steps count as
    DCP."""
    spec, parts = find_spec(trial.dataset), len(PROTOCOLS[trial.protocol].parts)
    classes = -(-(spec.num_classes or 0) // parts)
    images, tests = (
        trial.shots * classes,
        sum(counts[2] for name in trial.targets or (trial.dataset,) if (counts := find_spec(name).counts)),
    )
    total = pace.image * (2 * images + tests)  # images and mirror images for a text probe
    recipe: Any = trial.recipe.fitted(images, classes)
    if recipe.is_trained:
        steps = recipe.num_epochs * len(batch_sizes(images, recipe.batch_size, recipe.drop_last))
        total += steps * (pace.step + classes * pace.per_class) + pace.image * (images + tests)  # by its own prompts
    return total


def hours_text(model: str, trials: Sequence[Trial], device: str, precision: str) -> str:
    """How long the trials of a model take here, one after the other, by a step that is measured now."""
    try:
        measured = pace(model, device, precision)
    except ZooError as error:
        return f"Time of {model}: not measured. {error}"
    hours = sum(estimated_seconds(trial, measured) for trial in trials) / 3600
    step = measured.step + 100 * measured.per_class
    each = f"a training step with 100 classes takes {step:.2g} s here, and an image {measured.image:.2g} s"
    return f"Time of {model}: {hours:.1f} hours for {len(trials)} trials, one after the other; {each}."


def gigabytes(specs: Sequence[DatasetSpec]) -> float | None:
    """What the sources say they would send; None if one of them does not answer."""
    sizes = [size_of(archive) for spec in specs for archive in spec.archives]
    return None if None in sizes else sum(size for size in sizes if size) / 1e9


def size_of(archive: Archive) -> int | None:
    """The archive's size in bytes as its source states it; None if it does not answer."""
    try:
        request = urllib.request.Request(archive.url, headers=AGENT, method="HEAD")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, http.client.HTTPException, TypeError, ValueError):
        return None
