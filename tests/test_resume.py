"""Runs that are stopped, killed or fail, and resume as if nothing had happened."""

import errno
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers import close, three_digits, trained, until
from PIL import Image
from shared import build_tiny_clip
from small_zoo import SERVER
from timm.data import create_transform

from dcp_zoo import DCP, ZooError, create_model
from dcp_zoo.data import Item
from dcp_zoo.files import LOCK, locked
from dcp_zoo.heads.config import STATE_NAME
from dcp_zoo.training.loop import _mix, train
from dcp_zoo.training.methods.dcp import frozen_tokens
from dcp_zoo.training.recipes import Recipe, default_recipe
from dcp_zoo.training.run import RunOptions, plan, train_head
from dcp_zoo.training.sources import ImageSource, image_source, no_progress
from dcp_zoo.training.state import TrainingState
from dcp_zoo.zoo.factory import plain_clip

RECIPE = Recipe(lr=0.05, batch_size=4, epochs=3, optimizer="adamw", n_ctx=2)  # 2 steps per epoch
STEPS = 6


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Item]:
    """Ten small, distinct images of two classes."""
    folder, items = tmp_path_factory.mktemp("photos"), []
    for i in range(10):
        path = folder / f"{i}.png"
        image = Image.linear_gradient("L").resize((40, 36)).convert("RGB")
        image.paste((20 * i, 255 * (i % 2), 0), (i, 0, i + 20, 20))
        image.save(path)
        items.append(Item(str(path), path.name, i % 2))
    return items


@pytest.fixture(scope="module")
def views(photos) -> ImageSource:
    """The images and their mirror images, run through the miniature's frozen stem once."""
    return image_source(plain_clip("dcp_mini"), photos, "flip")


@pytest.fixture
def start(golden, photos, views):
    """Creates a small model with fresh prompts and its images: "crop-flip" read in this process, "workers" by two
    others, "views" of a hybrid CLIP's patch maps, or "late", the tokens that enter the first block with prompts."""

    def make(kind: str = "crop-flip") -> tuple[DCP, ImageSource]:
        torch.manual_seed(1)
        if kind in ("views", "late"):
            late = {"prompted_blocks": 2} if kind == "late" else {}
            model = create_model("dcp_mini", "clip", classnames=["grey", "red"], n_ctx=2, depth=2, **late)
            return model, frozen_tokens(model, views, views, no_progress)[0]
        model = DCP(build_tiny_clip(golden), ["ant", "brontosaurus"], n_ctx=2)
        transform = create_transform(32, is_training=True, color_jitter=0.0)
        return model, ImageSource(model.encoder, photos, transform, workers=2 if kind == "workers" else 0)

    return make


def test_stored_tokens_say_what_the_images_say(start, views):
    """All parts of each reading, what the stem says of the whole image too, to half precision."""
    model, late = start("late")
    for reading in model.readings:
        read = late.read_by(reading, 1)
        assert read.shape[-1] == sum(reading.widths)
        assert close(read, views.read_by(reading, 1), 2e-3)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stop_after(steps: int, error: BaseException):
    """A progress bar that raises an error instead of the next step."""

    def progress(iterable, description, total):
        yield from islice(iterable, steps)
        raise error

    return progress


def stop_training(given: tuple[DCP, ImageSource], folder, steps: int, run=None, **options) -> None:
    """Train for some steps, then stop as by Ctrl-C; the state stays in the folder."""
    messages: list[str] = []
    state = TrainingState(folder / STATE_NAME, run, every=1e9, log=messages.append)
    with pytest.raises(KeyboardInterrupt):
        train(*given, RECIPE, progress=stop_after(steps, KeyboardInterrupt()), state=state, **options)
    assert f"after step {steps} is saved" in messages[0]


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    ("kind", "precision", "steps"),
    [
        ("crop-flip", "float32", [1, 4]),
        ("views", "float32", [3]),
        ("late", "float32", [3]),
        ("crop-flip", "bfloat16", [4]),
        ("crop-flip", "float16", [1]),
    ],
)
def test_a_stopped_run_resumes_bit_for_bit(start, tmp_path, kind, precision, steps):
    uninterrupted = start(kind)
    losses = train(*uninterrupted, RECIPE, precision=precision)
    assert len(set(losses)) == STEPS
    for step in steps:
        folder = tmp_path / str(step)
        folder.mkdir()
        stop_training(start(kind), folder, step, precision=precision)
        torch.rand(3)  # nothing depends on this process's random state
        stopped = start(kind)
        assert train(*stopped, RECIPE, precision=precision, state=TrainingState(folder / STATE_NAME)) == losses
        assert same(trained(stopped[0]), trained(uninterrupted[0]))


def test_worker_processes_change_nothing(start, tmp_path):
    """Whether they read the images, or a run resumes with another number of them."""
    once = replace(RECIPE, epochs=1)
    assert train(*start(), once) == train(*start("workers"), once)
    stop_training(start(), tmp_path, 1)
    assert train(*start("workers"), RECIPE, state=TrainingState(tmp_path / STATE_NAME)) == train(*start(), RECIPE)


def test_a_flat_loss_ends_the_run_also_after_a_stop(start, tmp_path, monkeypatch):
    recipe = replace(RECIPE, lr=0.0, weight_decay=0.0, epochs=5, flat_epochs=1)
    monkeypatch.setattr("dcp_zoo.training.recipes.NOT_LEARNT", 0.0)
    assert len(train(*start("late"), recipe)) == 2 * 5, "flat, but not learnt"
    monkeypatch.setattr("dcp_zoo.training.recipes.NOT_LEARNT", 9.0)
    assert len(train(*start("late"), recipe)) == 2 * 2, "twice one epoch of two steps"
    assert len(train(*start("late"), replace(recipe, flat_epochs=None))) == 2 * 5
    state = tmp_path / STATE_NAME
    whole = train(*start("late"), recipe, state=TrainingState(state))
    assert train(*start("late"), recipe, state=TrainingState(state)) == whole


# ---------------------------------------------------------------------------------------------------- rejected states


@pytest.fixture
def stopped(start, tmp_path):
    """The file of a run that was stopped after 3 steps."""
    run = {"model": "a", "seed": 1, "lr": 0.1}
    stop_training(start(), tmp_path, 3, run)
    return tmp_path / STATE_NAME, run


def test_the_state_of_another_run_is_rejected_with_the_differences(stopped, start):
    path, run = stopped
    for change, message in (
        ({"seed": 2}, "another run: seed 1 instead of 2. To resume, repeat"),
        ({"model": "b", "shots": 4}, "model a instead of b; shots None instead of 4"),
    ):
        with pytest.raises(ZooError, match=message):
            TrainingState(path, run | change)
    with pytest.raises(ZooError, match="another model"):
        train(*start("views"), RECIPE, state=TrainingState(path, run))


def test_a_damaged_file_is_rejected_with_advice(stopped):
    path, run = stopped
    content = path.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:1000], content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], b""):
        path.write_bytes(damaged)
        with pytest.raises(ZooError, match="damaged. Pass --overwrite"):
            TrainingState(path, run)


# -------------------------------------------------------------------------------------------------------------- faults


def test_after_an_unreadable_image_the_state_is_saved_and_the_run_resumes(start, photos, tmp_path):
    losses, broken = train(*start(), RECIPE), start()
    for _ in islice(broken[1].batches(4, torch.Generator().manual_seed(_mix(1, 0))), 1):
        pass  # the images of the first batch are now cached, so that the second step fails
    pictures = {Path(item.path): Path(item.path).read_bytes() for item in photos}
    for path in pictures:
        path.write_bytes(b"damaged")
    with pytest.raises(ZooError, match=r"Cannot read the image .*\.png: .* after step 1 is saved"):
        train(*broken, RECIPE, state=TrainingState(tmp_path / STATE_NAME))
    for path, content in pictures.items():
        path.write_bytes(content)
    assert train(*start(), RECIPE, state=TrainingState(tmp_path / STATE_NAME)) == losses


@pytest.mark.parametrize(("path", "message"), [("/nowhere.png", "No image at"), (__file__, "Cannot read the image")])
def test_the_message_of_an_unreadable_image_is_the_same_from_a_worker(start, photos, path, message):
    model, source = start()
    missing = replace(source, items=[*photos[:3], Item(path, "bad", 0)], workers=1)
    with pytest.raises(ZooError) as failure:
        train(model, missing, RECIPE)
    assert str(failure.value).startswith(f"{message} {path}")
    assert "Traceback" not in str(failure.value)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: no")])
def test_out_of_memory_comes_with_advice(start, tmp_path, error):
    with pytest.raises(ZooError, match="--set batch_size=N.* bfloat16.* after step 2 is saved"):
        train(*start(), RECIPE, progress=stop_after(2, error), state=TrainingState(tmp_path / STATE_NAME))


def test_a_bug_is_not_a_zoo_error(start, tmp_path, monkeypatch):
    monkeypatch.delattr(torch, "OutOfMemoryError", raising=False)  # new in torch 2.5
    with pytest.raises(RuntimeError, match="a bug"):
        train(*start(), RECIPE, progress=stop_after(2, RuntimeError("a bug")), state=TrainingState(tmp_path / "s"))


def test_a_diverged_run_keeps_the_last_good_state(start, tmp_path, monkeypatch):
    recipe = replace(RECIPE, optimizer="sgd")
    monkeypatch.setattr(Recipe, "lr_at", lambda self, epoch: 1e-3 if epoch == 0 else 1e30)
    with pytest.raises(ZooError, match=r"diverged.*The state after step [23] is saved"):
        train(*start(), recipe, state=TrainingState(tmp_path / STATE_NAME, every=0))
    weights = TrainingState(tmp_path / STATE_NAME)._found["trained"]
    assert all(t.isfinite().all() for t in weights)


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
    assert {path.name for path in tmp_path.iterdir()} == {STATE_NAME, "log.csv"}
    assert train(*start(), RECIPE, state=TrainingState(tmp_path / STATE_NAME)) == train(*start(), RECIPE)


# ------------------------------------------------------------------------------------------------------- killed runs


@pytest.fixture(scope="module")
def digits_run():
    changes = {"epochs": 4, "batch_size": 3, "n_ctx": 2, "depth": 2}  # 8 steps
    return plan(
        three_digits(), "dcp_mini", shots=2, recipe=replace(default_recipe("dcp_mini"), **changes), device="cpu"
    )


def plain(run, **changes):
    return replace(run, recipe=replace(run.recipe, classifier="none", **changes))


def test_killed_runs_resume_and_end_with_the_same_files(digits_run, tmp_path):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    train_head(digits_run, reference)
    for lines in (2, 5):
        _kill_when(digits_run, killed, lines)
        assert (killed / STATE_NAME).exists()
    _, metrics = train_head(digits_run, killed)
    assert {path.name for path in killed.iterdir()} == {"model.safetensors", "config.json", "log.csv"}
    assert (killed / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert _losses(killed) == _losses(reference)
    assert create_model(f"local-dir:{reference}", True).info["metrics"] == metrics


def _train_by_threads(number: int, run, folder) -> None:
    """Train by so many threads, as the last bits depend on them."""
    torch.set_num_threads(number)
    train_head(run, folder, RunOptions(save_every=0))


def _kill_when(run, folder, lines: int) -> None:
    """Start a run in a new process, and kill it when its log has this many lines."""
    process = SERVER.Process(target=_train_by_threads, args=(torch.get_num_threads(), run, folder))
    process.start()
    log = folder / "log.csv"
    until(lambda: not process.is_alive() or (log.exists() and len(log.read_text().splitlines()) >= lines), 120)
    assert process.is_alive()
    process.kill()
    process.join()


def _losses(folder) -> list[str]:
    return [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]


def test_a_run_killed_while_testing_is_not_trained_again(digits_run, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dcp_zoo.training.run.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_head(plain(digits_run), tmp_path)
    assert (tmp_path / STATE_NAME).exists()
    assert not (tmp_path / "model.safetensors").exists()  # it is written once, with its metrics
    monkeypatch.undo()
    messages = []
    train_head(plain(digits_run), tmp_path, RunOptions(log=messages.append))
    assert "Resuming after step 8" in " ".join(messages)


def test_overwrite_starts_again(digits_run, tmp_path):
    (tmp_path / STATE_NAME).write_bytes(b"of another run")
    with pytest.raises(ZooError, match="--overwrite"):
        train_head(digits_run, tmp_path)
    train_head(plain(digits_run, epochs=1), tmp_path, RunOptions(overwrite=True))
    assert not (tmp_path / STATE_NAME).exists()


def test_two_trainings_do_not_share_a_folder(digits_run, tmp_path):
    (tmp_path / STATE_NAME).write_bytes(b"of the other")
    message = f"Another process trains or saves a head in {tmp_path}: wait"
    for overwrite in (False, True):
        with locked(tmp_path / LOCK), pytest.raises(ZooError, match=message):
            train_head(digits_run, tmp_path, RunOptions(overwrite=overwrite))
    assert (tmp_path / STATE_NAME).read_bytes() == b"of the other"
