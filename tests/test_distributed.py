"""One run in two processes, with gloo: the losses and weights of one process, and no process waits for a failed one."""

import multiprocessing
import os
import re
import signal
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import trained
from shared import build_tiny_clip
from test_resume import stop_after
from timm.data import create_transform
from torch import nn

from dcp_zoo import DCP, FewShotClassifier, ZooError, create_model
from dcp_zoo.data import Item, load_split
from dcp_zoo.training import distributed
from dcp_zoo.training.callbacks import History
from dcp_zoo.training.loop import train
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.training.sources import ImageSource, image_source
from dcp_zoo.training.state import STATE_NAME, TrainingState

RECIPE = Recipe(lr=0.01, batch_size=4, epochs=5, n_ctx=2)  # of 8 images: 10 steps
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def source(golden):
    """Creates a small model with fresh prompts and 8 digits: "bidirectional" or "text_to_vision", or "views" of a
    hybrid CLIP."""
    digits = sorted(load_split("digits").items, key=lambda item: int(item.key))[:8]
    items = [item._replace(label=i % 2) for i, item in enumerate(digits)]

    def make(kind: str = "bidirectional", dtype: torch.dtype = torch.float32) -> ImageSource:
        torch.manual_seed(1)
        if kind == "views":
            model = create_model("dcp_mini", "clip", classnames=["even", "odd"], n_ctx=2, depth=2)
            return image_source(model, items, "flip")
        model = DCP(build_tiny_clip(golden), ["ant", "brontosaurus"], n_ctx=2, coupling=kind).to(dtype)
        return ImageSource(model, items, create_transform(32, is_training=True, color_jitter=0.0))

    return make


def launch(work, processes: int = 2, timeout: float = 100, group=distributed.process_group) -> list:
    """What `work()` returns in each process, or the exception it raises; None for a killed process."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun has one
    pipes, running = [], []
    for number in range(processes):
        receiver, sender = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_process, args=(work, number, processes, store.port, timeout, group, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        running.append(process)
    results = [_received(pipe) for pipe in pipes]
    for process in running:
        process.join()
    return results


def _process(work, number: int, processes: int, port: int, timeout: float, group, sender) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    try:
        with group("cpu", timedelta(seconds=timeout)):
            sender.send(work())
    except BaseException as error:
        sender.send(error if isinstance(error, ZooError) else repr(error))
    os._exit(0)


def _received(pipe):
    assert pipe.poll(120), "a process hangs"
    try:
        return pipe.recv()
    except EOFError:
        return None


# ---------------------------------------------------------------------------------------------------- the same result


@pytest.fixture
def float64(monkeypatch):
    """In double precision rounding is negligible, so that equal results compare equal."""
    monkeypatch.setattr("dcp_zoo.model.dcp.LayerNormFp32.forward", nn.LayerNorm.forward)


def test_validation_images_are_classified_as_by_one_process(source):
    def work():
        shared, history = source("views"), History()
        train(shared, replace(RECIPE, epochs=2), callbacks=[history], validation=shared)
        return [epoch.val_loss for epoch in history.epochs]

    assert launch(work) == [pytest.approx(work(), rel=1e-3)] * 2


def test_the_others_wait_for_the_main_process_longer_than_for_a_step():
    """As while it alone calibrates and tests."""

    def work():
        return distributed.from_main(lambda: time.sleep(3) or "measured")

    assert launch(work, timeout=2) == ["measured"] * 2


@pytest.mark.parametrize(
    ("changes", "coupling"),
    [({}, "bidirectional"), ({"batch_size": 3}, "text_to_vision"), ({"batch_size": 16, "epochs": 10}, "bidirectional")],
)  # of 8 images; 3 is 2 + 1
def test_two_processes_train_like_one(source, float64, coupling, changes):
    recipe = replace(RECIPE, **changes)

    def work():
        shared = source(coupling, torch.float64)
        return train(shared, recipe), {name: t.numpy() for name, t in trained(shared.model).items()}

    losses, weights = work()
    assert len(set(losses)) == 10
    for other_losses, others in launch(work):
        assert other_losses == pytest.approx(losses, abs=1e-6)
        for name, expected in weights.items():
            assert np.linalg.norm(others[name] - expected) < 1e-12 * np.linalg.norm(expected), name


def test_two_processes_at_batch_2_give_the_losses_of_one_at_batch_4(source):
    """In float32, with the miniature."""
    losses = train(source("views"), RECIPE)
    for others in launch(lambda: train(source("views"), RECIPE)):
        assert others == pytest.approx(losses, abs=1e-5)


def test_without_the_shared_mean_the_losses_differ(source, monkeypatch):
    """The test above can fail: if each process fuses over its own images only, the losses differ."""
    losses = train(source(), RECIPE)
    monkeypatch.setattr(distributed, "batch_mean", lambda x, batch_size: x.mean(0))
    assert launch(lambda: train(source(), RECIPE))[0] != pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_in_half_precision_the_processes_agree(source, precision):
    """With each other exactly, including float16's skipped steps; with a single process up to rounding."""
    first, second = launch(lambda: train(source(), RECIPE, precision=precision))
    assert first == second
    assert first[0] == pytest.approx(train(source(), replace(RECIPE, epochs=1), precision=precision)[0], abs=0.05)


def test_a_stopped_run_resumes_in_two_processes(source, tmp_path):
    """Bit for bit; only the main process has the file."""

    def stop():
        state = TrainingState(tmp_path / STATE_NAME)
        train(source(), RECIPE, progress=stop_after(7, KeyboardInterrupt()), state=state)

    def resume():
        return train(source(), RECIPE, state=TrainingState(tmp_path / STATE_NAME))

    assert launch(stop)[0].startswith("KeyboardInterrupt")
    assert launch(resume) == launch(lambda: train(source(), RECIPE))


@contextmanager
def group_of_the_users_own(device, timeout):
    dist.init_process_group("gloo", timeout=timeout)
    yield
    dist.destroy_process_group()


def test_in_a_group_of_the_users_own_each_process_works_alone(source):
    """One that trains does not wait for the others, and all get the whole head."""
    images = [np.full((32, 32, 3), 20 * i, np.uint8) for i in range(8)]

    def work():
        losses = train(source(), RECIPE) if dist.get_rank() == 0 else None
        classifier = FewShotClassifier().fit(images, ["dark"] * 4 + ["light"] * 4)
        return losses, classifier.predict_proba(images).tolist(), classifier.model_.text_probe is not None

    (losses, first, has_probe), (_, second, _) = launch(work, timeout=60, group=group_of_the_users_own)
    assert losses == train(source(), RECIPE)
    assert (has_probe, second) == (True, first)


# ------------------------------------------------------------------------------------------------ rejections and faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 1}, "batch of 1 images cannot be shared by 2"), ({"pooling": "max"}, "only pooling=mean")],
)
def test_runs_that_cannot_be_shared_are_rejected(source, changes, message):
    def work():
        shared = source()
        shared.model.config = replace(shared.model.config, pooling=changes.get("pooling", "mean"))
        train(shared, replace(RECIPE, **changes))

    _check_one_reports(launch(work), message)


def test_processes_of_different_commands_are_rejected():
    results = launch(lambda: TrainingState(run={"seed": distributed.rank()}))
    _check_one_reports(results, "another command: seed [01] instead of [01]")


def test_an_error_in_one_process_ends_all_with_its_message(source):
    def work():
        shared = source()
        if distributed.rank() == 1:
            shared.items = [Item("/nowhere.png", "nowhere.png", 0)] * 8
        train(shared, RECIPE)

    first, second = launch(work)
    assert str(second).startswith("Process 2 of 2: No image at /nowhere.png")
    assert first == "SystemExit(1)"


def test_a_killed_process_ends_the_others(source, tmp_path):
    def work():
        state = TrainingState(tmp_path / STATE_NAME)
        train(source(), RECIPE, progress=_kill_second, state=state)

    first, second = launch(work)
    assert second is None
    assert "died" in str(first)
    assert "after step 3 is saved" in str(first)


def _kill_second(iterable, description, total):
    for step, batch in enumerate(iterable):
        if step == 3 and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def test_a_process_that_hangs_ends_the_others_after_the_timeout(source):
    def work():
        if distributed.rank() == 1:
            time.sleep(3)
        train(source(), RECIPE)

    started = time.monotonic()
    assert "did not respond in time" in str(launch(work, timeout=2)[0])
    assert time.monotonic() - started < 60


def _check_one_reports(results, message: str) -> None:
    messages = [str(result) for result in results]
    assert sorted(result == "SystemExit(1)" for result in messages) == [False, True]
    assert any(re.search(message, text) for text in messages)
