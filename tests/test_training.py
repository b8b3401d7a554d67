"""Recipes, training and evaluation, on small models that really learn."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import FEW_STEPS, three_digits, train, training_steps
from torch.nn import functional as F

from dcp_zoo import ZooError, create_model
from dcp_zoo.data import Item, all_for_training, few_shot, subset_sha256
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import CACHE_BYTES, Photos
from dcp_zoo.prediction.heads import outputs_of_loader
from dcp_zoo.training.evaluation import top1
from dcp_zoo.training.loop import warn_if_not_learnt
from dcp_zoo.training.methods import fit_head
from dcp_zoo.training.methods.dcp import regularised_loss, round_and_store_stats
from dcp_zoo.training.recipes import default_recipe
from dcp_zoo.training.run import BEFORE_REFIT, RunOptions, plan, train_head, train_on_all
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.build import plain_clip

pytestmark = FEW_STEPS

QUICK = {"epochs": 3, "batch_size": 4, "n_ctx": 2, "depth": 2}


@pytest.fixture(scope="module")
def red_and_blue(photos) -> list[Item]:
    return [item for item in photos if item.label < 2]


def mini(**args):
    torch.manual_seed(0)
    return create_model("dcp_mini", "clip", classnames=["red", "blue"], **({"n_ctx": 2, "depth": 2} | args))


@pytest.fixture(scope="module")
def images(red_and_blue) -> Callable[..., ImageLoader]:
    """The pictures, run through the frozen stem of one CLIP once for each augmentation."""
    extract = FeatureExtractor(plain_clip("dcp_mini"))

    @cache
    def shared(augment: str = "none") -> ImageLoader:
        loader = ImageLoader(Photos(red_and_blue, CACHE_BYTES), extract, augment)
        return loader.after_stem(loader.training_views)

    return shared


def test_training_learns(images, tmp_path):
    model = mini()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    recipe = replace(default_recipe("dcp_mini"), **(QUICK | {"epochs": 6, "augment": "crop-flip"}))
    crops = images("crop-flip")
    losses = train(model, crops, recipe)
    assert len(losses) == 12
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    round_and_store_stats(model, images())
    assert model.stats == "stored"
    logits = torch.from_numpy(outputs_of_loader(model, images(), 100).logits)
    assert top1(logits, crops.labels) == 100
    model.save_pretrained(tmp_path)  # what is measured is what is saved: rounded weights
    loaded = create_model(f"local-dir:{tmp_path}", True).eval()
    torch.testing.assert_close(torch.from_numpy(outputs_of_loader(loaded, images(), 100).logits), logits)


def test_agreement_is_the_distance_to_zero_shot_features():
    model, images, labels = mini().train(), torch.randn(3, 3, 192, 192), torch.tensor([0, 1, 1])
    targets = model.encoder.encode_image(images)
    loss, cross_entropy = regularised_loss(model, 2.0)(images, labels, targets)
    losses = F.cross_entropy(model(images), labels, reduction="none")
    features, text = model.encode(images)
    text_distance = (text - model.encoder.zero_shot_classifier(["red", "blue"])).abs().mean()
    image_distance = (features - F.normalize(model.encoder.clip.encode_image(images), dim=-1)).abs().mean()
    expected = losses.mean() + 2 * (25 * text_distance + 10 * image_distance)
    assert torch.allclose(loss, expected, atol=1e-5)
    assert torch.allclose(cross_entropy, losses.mean())


@torch.no_grad()
def test_targets_are_zero_shot_features_of_the_view_or_of_the_whole_image(images, red_and_blue):
    """Of a mirror image, or of the image of which it is a crop."""
    crops = images("crop-flip")
    flips = ImageLoader(Photos(red_and_blue), crops.extract, "flip")
    known = images("flip").table(views=flips.training_views).embeddings.rows(*flips.training_views)
    encode = crops.extract.clip.encode_image
    inputs, _, targets = next(iter(flips.shuffled([8], torch.Generator().manual_seed(1), targets=known)))
    torch.testing.assert_close(targets, encode(inputs), atol=1e-5, rtol=1e-4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    _, _, targets = next(iter(crops.shuffled([8], torch.Generator().manual_seed(1), targets=known)))
    torch.testing.assert_close(targets, encode(next(iter(crops.in_order(8)))[0])[order], atol=1e-5, rtol=1e-4)


def test_training_images_that_are_not_learnt_are_warned_about(images):
    recipe = replace(default_recipe("dcp_mini"), **QUICK | {"augment": "none", "classifier": "none", "epochs": 1})
    clip = images().extract.clip
    with pytest.warns(UserWarning, match=r"Training has not converged: .* where guessing gives 0.69.*epochs=3"):
        fit_head("dcp", Task(clip, "dcp_mini", ["red", "blue"], "a photo of a {}.", images(), None, recipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_not_learnt(0.27, 2, 2)


@pytest.fixture(scope="module")
def digits_run(small_model):
    recipe = replace(default_recipe("dcp_mini"), **QUICK | {"batch_size": 3})
    return plan(three_digits(), small_model, shots=2, recipe=recipe, device="cpu", precision="float32")


def test_a_refit_that_was_stopped_does_not_train_the_first_head_again(digits_run, tmp_path):
    """Nor another one: that would be the training of another run. A refit trains on all images, and keeps
    the measured accuracy."""
    split, seen = replace(few_shot(digits_run.split, 3, 1), val=[], test=[]), []
    recipe = replace(digits_run.recipe, epochs=1, classifier="none")
    run = replace(digits_run, split=split, recipe=recipe, shots=None, test_share=1 / 3)
    whole = train_on_all(run, tmp_path / "whole", RunOptions(show=seen.append))
    info = create_model(f"local-dir:{tmp_path / 'whole'}", True).info
    assert (len(seen), info["metrics"], info["test_images"], info["test_share"]) == (1, whole[1], 3, 0)
    assert info["subset_sha256"] == subset_sha256(all_for_training(split).train)
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"model.safetensors", "config.json"}

    def stop_before_the_refit(message: str) -> None:
        if message.startswith("Refitting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on_all(run, tmp_path / "out", RunOptions(log=stop_before_the_refit))
    texts = {name: ["a digit"] for name in run.split.classnames}
    others = {"seed": 2}, {"recipe": replace(run.recipe, lr=1e-3)}, {"descriptions": texts}
    for other in others:
        with pytest.raises(ZooError, match="is the state of another run"):
            train_on_all(replace(run, **other), tmp_path / "out")
    with training_steps() as steps:
        head, metrics = train_on_all(run, tmp_path / "out")
    assert len(steps) == 3  # of the refit: nine images, three at a time
    assert metrics == whole[1]
    ours, theirs = head.to_state(), whole[0].to_state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "out" / BEFORE_REFIT).exists()


def test_half_precision_calibrates_in_float32(digits_run, tmp_path):
    split = replace(digits_run.split, val=[])
    recipe = replace(digits_run.recipe, epochs=1, classifier="none")
    model, _ = train_head(replace(digits_run, split=split, shots=1, precision="bfloat16", recipe=recipe), tmp_path)
    stored = model.stored_stats.clone()
    round_and_store_stats(model, ImageLoader(Photos(few_shot(split, 1, 1).train), FeatureExtractor(model.encoder)))
    assert torch.equal(model.stored_stats.half(), stored.half())
    assert model.encoder.visual.proj.dtype == torch.float32
