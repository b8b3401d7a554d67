"""Runs that are stopped, killed or fail, and resume as if nothing had happened."""

import errno
import os
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import FEW_STEPS, three_digits, train
from shared import CFG, build_tiny_clip

from dcp_zoo import DCP, ZooError, create_model
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import CACHE_BYTES, Photos
from dcp_zoo.files import LOCK, locked
from dcp_zoo.training.folder import STATE_NAME
from dcp_zoo.training.loop import mixed_seed
from dcp_zoo.training.recipes import Recipe, default_recipe
from dcp_zoo.training.run import RunOptions, plan, train_head
from dcp_zoo.training.state import TrainingState
from dcp_zoo.zoo.build import plain_clip

pytestmark = FEW_STEPS

RECIPE = Recipe(lr=0.05, batch_size=4, epochs=3, optimizer="adamw", n_ctx=2)  # 2 steps per epoch
STEPS = 6


@pytest.fixture(scope="module")
def eight(photos) -> list[Item]:
    return [item for item in photos if item.label < 2]


@pytest.fixture(scope="module")
def views(eight) -> ImageLoader:
    """The images and their mirror images, run through the miniature's frozen stem once."""
    images = ImageLoader(Photos(eight), FeatureExtractor(plain_clip("dcp_mini")), "flip")
    return images.after_stem(images.training_views)


@pytest.fixture
def start(golden, eight, views):
    """Creates a small model with fresh prompts and its images: "crop-flip" read in this process, "workers"
    by two others, or "views" of a hybrid CLIP's tokens."""

    def make(kind: str = "crop-flip") -> tuple[DCP, ImageLoader]:
        torch.manual_seed(1)
        if kind == "views":
            return create_model("dcp_mini", "clip", classnames=["grey", "red"], n_ctx=2, depth=2), views
        model = DCP(FrozenCLIP(build_tiny_clip(golden), pretrained_cfg=CFG), ["ant", "brontosaurus"], n_ctx=2)
        workers = 2 if kind == "workers" else 0
        return model, ImageLoader(Photos(eight, CACHE_BYTES), FeatureExtractor(model.encoder), "crop-flip", workers)

    return make


def stop_after(steps: int, error: BaseException):
    """A progress bar that raises an error instead of the next step."""

    def progress(iterable, description, total):
        yield from islice(iterable, steps)
        raise error

    return progress


def stop_training(given: tuple[DCP, ImageLoader], folder, steps: int, run=None, **options) -> None:
    """Train for some steps, then stop as by Ctrl-C; the state stays in the folder."""
    messages: list[str] = []
    state = TrainingState(folder / STATE_NAME, run, every=1e9, log=messages.append)
    with pytest.raises(KeyboardInterrupt):
        train(*given, RECIPE, progress=stop_after(steps, KeyboardInterrupt()), state=state, **options)
    assert f"after step {steps} is saved" in messages[-1]


@pytest.mark.parametrize(
    ("kind", "precision", "step"),
    [
        ("crop-flip", "float32", 1),
        ("views", "float32", 3),
        ("crop-flip", "bfloat16", 4),
        ("crop-flip", "float16", 1),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(start, tmp_path, kind, precision, step):
    """Whatever number of processes reads the images."""
    uninterrupted = start(kind)
    losses = train(*uninterrupted, RECIPE, precision=precision)
    assert len(set(losses)) == STEPS
    stop_training(start(kind), tmp_path, step, precision=precision)
    torch.rand(3)  # nothing depends on this process's random state
    stopped = start("workers" if precision == "bfloat16" else kind)
    assert train(*stopped, RECIPE, precision=precision, state=TrainingState(tmp_path / STATE_NAME)) == losses
    trained, expected = (model.to_state() for model, _ in (stopped, uninterrupted))
    assert all(torch.equal(trained[name], tensor) for name, tensor in expected.items())


def test_the_state_of_another_run_and_a_damaged_one_are_rejected(start, tmp_path):
    path, run = tmp_path / STATE_NAME, {"model": "a", "seed": 1, "lr": 0.1}
    stop_training(start(), tmp_path, 3, run)
    with pytest.raises(ZooError, match="another run, which differs in model, shots. To resume, repeat"):
        TrainingState(path, run | {"model": "b", "shots": 4})
    content = path.read_bytes()
    for damaged in (content[:1000], content[: len(content) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(ZooError, match="damaged. Pass --overwrite"):
            TrainingState(path, run)


def test_after_an_unreadable_image_the_state_is_saved_and_the_run_resumes(start, eight, tmp_path):
    losses, broken = train(*start(), RECIPE), start()
    for _ in islice(broken[1].shuffled([4, 4], torch.Generator().manual_seed(mixed_seed(1, 0))), 1):
        pass  # the images of the first batch are now cached, so that the second step fails
    pictures = {Path(item.path): Path(item.path).read_bytes() for item in eight}
    for path in pictures:
        path.write_bytes(b"damaged")
    with pytest.raises(ZooError, match=r"Cannot read the image .*\.png: .* after step 1 is saved"):
        train(*broken, RECIPE, state=TrainingState(tmp_path / STATE_NAME))
    with pytest.raises(ZooError, match="^Cannot read the image ") as failure:
        train(*start("workers"), RECIPE)
    assert "Traceback" not in str(failure.value)
    for path, content in pictures.items():
        path.write_bytes(content)
    assert train(*start(), RECIPE, state=TrainingState(tmp_path / STATE_NAME)) == losses


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "--set batch_size=N.* bfloat16.* after step 2 is saved"),
        (RuntimeError("DefaultCPUAllocator: no"), "--set batch_size=N.* bfloat16.* after step 2 is saved"),
        (RuntimeError("a bug"), "^a bug$"),
    ],
)
def test_out_of_memory_comes_with_advice_and_a_bug_as_it_is(start, tmp_path, error, message):
    with pytest.raises((ZooError, RuntimeError), match=message):
        train(*start(), RECIPE, progress=stop_after(2, error), state=TrainingState(tmp_path / STATE_NAME))


def test_a_diverged_run_keeps_the_last_good_state(start, tmp_path):
    """The first epoch, with the warm-up's rate, is still a good one."""
    recipe = replace(RECIPE, optimizer="sgd", warmup_lr=1e-3, lr=1e30)
    with pytest.raises(ZooError, match=r"diverged.*The state after step [23] is saved"):
        train(*start(), recipe, state=TrainingState(tmp_path / STATE_NAME, every=0))
    saved = torch.load(tmp_path / STATE_NAME, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in saved["trained"])


def test_a_full_disk_leaves_the_last_good_state(start, tmp_path, monkeypatch):
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ZooError, match="No space left on device. The state after step 2 is saved"):
        train(*start(), RECIPE, state=TrainingState(tmp_path / STATE_NAME, every=0))
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {STATE_NAME}
    assert train(*start(), RECIPE, state=TrainingState(tmp_path / STATE_NAME)) == train(*start(), RECIPE)


@pytest.fixture(scope="module")
def digits_run(small_model):
    changes = {"epochs": 4, "batch_size": 3, "n_ctx": 2, "depth": 2, "classifier": "none"}  # 8 steps
    recipe = replace(default_recipe("dcp_mini"), **changes)
    return plan(three_digits(), small_model, shots=2, recipe=recipe, device="cpu", precision="float32")


def test_killed_runs_resume_and_end_with_the_same_files(digits_run, tmp_path):
    """From what is on the disk after four steps; also one that is stopped while it is tested, which does not
    train again."""
    reference, killed, messages = tmp_path / "reference", tmp_path / "killed", []

    def copy(model, epoch) -> None:
        if epoch.step == 4:
            shutil.copytree(reference, killed)

    def stopped_in_the_test(iterable, description, total):
        if description == "test images":
            raise KeyboardInterrupt
        return iterable

    train_head(digits_run, reference, RunOptions(save_every=0, callbacks=[copy]))
    assert (killed / STATE_NAME).exists()
    with pytest.raises(KeyboardInterrupt):
        train_head(digits_run, killed, RunOptions(progress=stopped_in_the_test))
    assert not (killed / "model.safetensors").exists()  # it is written once, with its metrics
    _, metrics = train_head(digits_run, killed, RunOptions(log=messages.append))
    assert "Resuming after step 8" in " ".join(messages)
    assert {path.name for path in killed.iterdir()} == {"model.safetensors", "config.json"}
    assert (killed / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    info = create_model(f"local-dir:{reference}", True).info
    assert (info["metrics"], info["dataset"], info["shots"], info["seed"]) == (metrics, "digits", 2, 1)
    with pytest.raises(ZooError, match="already holds a checkpoint"):
        train_head(digits_run, killed)


def test_two_trainings_do_not_share_a_folder(digits_run, tmp_path):
    """And a stopped one is overwritten only if that is asked for."""
    (tmp_path / STATE_NAME).write_bytes(b"of the other")
    message = f"Another process trains or saves a head in {tmp_path}: wait"
    for overwrite in (False, True):
        with locked(tmp_path / LOCK, ""), pytest.raises(ZooError, match=message):
            train_head(digits_run, tmp_path, RunOptions(overwrite=overwrite))
    assert (tmp_path / STATE_NAME).read_bytes() == b"of the other"
    with pytest.raises(ZooError, match="--overwrite"):
        train_head(digits_run, tmp_path)
    short = replace(digits_run, recipe=replace(digits_run.recipe, epochs=1))
    train_head(short, tmp_path, RunOptions(overwrite=True))
    assert not (tmp_path / STATE_NAME).exists()
