"""Shared by several test files: comparisons, and models whose trained parameters differ from their initial
values."""

import copy
import csv
import io
import json
import logging
import os
import random
import re
import resource
import signal
import socket
import tarfile
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from dcp_zoo.answers import Outputs, Row, in_distribution_score
from dcp_zoo.benchmark import Trial, plan
from dcp_zoo.data import Split, load_for_training, load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.prediction import Backend, Predictor, job
from dcp_zoo.probe import ReadingFeatures, TextProbe, fit_on_features
from dcp_zoo.training.loop import train as train_task
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.state import TrainingState
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.factory import create_transform

FEW_STEPS = pytest.mark.filterwarnings("ignore:Training has not converged")  # of tests that train for a few steps


@contextmanager
def training_steps(stop_after: int | None = None) -> Iterator[list[None]]:
    """A list that gets an entry for each step of an optimizer inside. After so many, what runs is stopped as
    by Ctrl-C, in the forward pass of the next one."""
    steps: list[None] = []

    def stop(*_: Any) -> None:
        if len(steps) == stop_after:
            raise KeyboardInterrupt

    hooks = [
        register_optimizer_step_post_hook(lambda *_: steps.append(None)),
        register_module_forward_pre_hook(stop),
    ]
    try:
        yield steps
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def stopped_in_image_tower(after: int = 0) -> Iterator[None]:
    """Inside, what encodes images is stopped as by Ctrl-C, once so many are encoded."""
    encoded = 0

    def stop(layer: nn.Module, inputs: Any) -> None:
        nonlocal encoded
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            if encoded >= after:
                raise KeyboardInterrupt
            encoded += len(inputs[0])

    hook = register_module_forward_pre_hook(stop)
    try:
        yield
    finally:
        hook.remove()


def train(model: Any, images: Any, recipe: Any, **options: Any) -> list[float]:
    """Train a model as the methods do; the losses."""
    return train_task(Task(model.encoder, "", model.classnames, model.texts, images, None, recipe, **options), model)


class StoppedState(TrainingState):
    """That of a training which is stopped after a step, as by Ctrl-C."""

    def __init__(self, last: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.last = last

    def step(self, loss: float) -> None:
        super().step(loss)
        if len(self.losses) == self.last:
            raise KeyboardInterrupt


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal up to a relative tolerance of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item() < tolerance


def loud(model: Any) -> Any:
    """Perturb the trainable parameters strongly, so that errors in them become visible."""
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn_like(p)
    return model


def copied(head: Any) -> Any:
    """A copy that shares the tokenizer, whose dictionaries take longer than all weights."""
    return copy.deepcopy(head, {id(head.encoder.tokenizer): head.encoder.tokenizer})


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the tensors of a checkpoint, and their hash."""
    save_file(tensors, folder / WEIGHTS_NAME)
    config = json.loads((folder / CONFIG_NAME).read_text()) | {"weights_sha256": sha256_of(folder / WEIGHTS_NAME)}
    (folder / CONFIG_NAME).write_text(json.dumps(config))


def empty_probe(head: Any, parts: int | None = None) -> TextProbe:
    """A text probe of zeros that reads so many parts of each reading; default: all."""
    widths = [reading.widths[:parts] for reading in head.available_readings]
    return TextProbe(head.classes, widths, widths[0][0] if head.has_own_features else 0)


@torch.no_grad()
def in_distribution(head: Any, images: torch.Tensor) -> torch.Tensor:
    """The `in_distribution_score` (n,) of images (n, 3, H, W)."""
    distances = head.distances(head.encode_image(images)).numpy()
    return torch.from_numpy(in_distribution_score(head(images).numpy(), distances))


@torch.no_grad()
def rejecting(head: Any) -> Any:
    """A copy of a head of four classes that rejects one of the package's first two photographs and the last
    of those that it accepts, which is an example of none of the classes. Of some others it can be trusted."""
    head = copy.deepcopy(head)
    images = torch.stack([create_transform(head)(load_image(path)) for path in sample_images()])
    views, labels = head.encode_image(images)[None], torch.arange(len(images)) % 4
    head.text_probe = fit_on_features(head.classes, labels, [ReadingFeatures(views, head.method_linear())])[0]
    head.text_probe.threshold.copy_(in_distribution(head, images[:2]).mean())
    accepted = [i for i, name in enumerate(head.predict(images, True)) if name is not None]
    head.text_probe.margin = head.distances(views[0, accepted[-1:]])[0] / 2
    head.text_probe.examples = views[0, accepted[-1:]]
    assert [i for i, name in enumerate(head.predict(images, True)) if name is not None] == accepted[:-1]
    sure = head(images)[accepted[:-1]].softmax(-1).amax(-1).sort().values
    sets, trusted = {"0.9": 0.2, "0.95": 0.01}, {"0.05": sure[:2].mean().item()}
    head.info["text_probe"] = {"promises": {"images": 20.0, "sets": sets, "trusted": trusted, "share": 50.0}}
    return head


def gradients(model: nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of a function of the logits, by the names of the trainable parameters."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(logits.logsumexp(-1).sum(), parameters.values()), strict=True))


def made_up_result(trial: Trial, *entries: tuple[str, str, str, float], **changes: Any) -> dict[str, Any]:
    """The content of a trial's file, with (target, classes, stats, top1) entries: nothing in it was
    measured."""
    names = ("target", "classes", "stats", "top1")
    others = {"ece": 4.0, "nll": 0.456, "images": 10}
    entries = entries or ((trial.dataset, "all", "", 50.0 + trial.seed),)
    return {
        "trial": asdict(trial),
        "split_sha256": "of no images",
        "images": dict.fromkeys((trial.dataset, *trial.targets), "none"),
        "made_by": plan.made_by(),
        "weights": plan.weights_id(trial.model),
        "precision": "float32",
        "recipe": trial.recipe.as_dict(),
        "selection": VALIDATION if METHODS[trial.method].chooses else "none",
        "results": [dict(zip(names, entry, strict=True)) | others for entry in entries],
        "train_seconds": 10.0 * trial.shots,
    } | changes


def three_digits() -> Split:
    """Three classes of the ten of scikit-learn's digits, and five test images: enough for a run that takes
    seconds."""
    digits = load_for_training("digits", None)
    train, val, test = ([item for item in part if item.label < 3] for part in (digits.train, digits.val, digits.test))
    return replace(digits, classnames=digits.classnames[:3], train=train, val=val, test=test[:5])


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    image.save(file := io.BytesIO(), format)
    return file.getvalue()


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """An archive with these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            (member := tarfile.TarInfo(name)).size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read_csv(path: Path | str) -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@contextmanager
def http_server(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on a free port, which answers in threads."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def png_that_claims(side: int, data: bytes = b"") -> bytes:
    """A PNG with a header for so many rows and columns of grey pixels, whatever `data` holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = 2 * side.to_bytes(4, "big") + bytes((8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


class Count:
    """Counts the calls of a function of `owner`, which otherwise works as before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        self.calls, function = 0, getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)


def use_endpoint(monkeypatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE do in a new process."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, huggingface_hub.file_download):  # before 1.0 the latter has a copy
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    by_https = huggingface_hub.utils._http.REPO_API_REGEX  # whose 401 may stand for a repo that does not exist
    by_both = re.compile(re.sub("https?://", "https?://", by_https.pattern), by_https.flags)
    monkeypatch.setattr(huggingface_hub.utils._http, "REPO_API_REGEX", by_both)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between the client's retries


@contextmanager
def offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 does in a new process."""
    # before 1.0 the client keeps its sessions, and a session knows whether it is offline
    forget = getattr(huggingface_hub.utils, "reset_sessions", lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        forget()
        yield
    forget()


def recipe(name: str) -> Any:
    """The code of the page on many machines that has this in it, compiled as it stands."""
    page = Path(__file__).parents[1] / "docs" / "many_images.md"
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if name in code)
    return compile(code, page, "exec")


class Around(Predictor):
    """Of a backend that is there already, on which its answers depend as `plan` says."""

    def __init__(self, backend: Backend, plan: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__("dcp_mini", **{"top_k": 5} | options)
        self.backend, self.plan = backend, plan or {}

    def depends_on(self) -> dict[str, Any]:
        return self.plan


def classify(images: Sequence[str], backend: Backend, **options: Any) -> Iterator[tuple[list[Row], Outputs]]:
    """The batches of a run with these options."""
    return job.classify(images, Around(backend, **options))


def answers(predictor: Backend, image: Any, top_k: int = 5) -> list[dict[str, Any]]:
    """The predictions for one image."""
    return predictor.outputs([image], 1)[1].rows(predictor.classnames, top_k)[0]["predictions"]


def photo(path: Path, number: int = 0) -> Path:
    """Write grey noise, the same for the same names of folder and file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*f"{path.parent.name}/{path.name}".encode(errors="replace")])
    noise = rng.normal(128, 30 + number, (140, 130)).clip(0, 255)
    Image.fromarray(noise.astype(np.uint8)).convert("RGB").save(path)
    return path


def noisy_picture(path: Path, color: tuple[int, int, int], rng: np.random.Generator) -> str:
    """Write a picture of one colour and noise; its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.normal(0, 25, (140, 150, 3)) + color
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return str(path)


def behind_the_gate(
    own: torch.Tensor, text: torch.Tensor, distances: torch.Tensor, near: float, width: float
) -> torch.Tensor:
    """Log-probabilities: behind the nearer distance the text gets a say, the more so the surer it is."""
    own, text = own.softmax(-1), text.softmax(-1)
    known, seen = (each.amax(1) - 1 / each.shape[1] for each in (text, own))
    share = (((distances - near) / width).clamp(0, 1) * known / (known + seen / 4))[:, None]
    return ((1 - share) * own + share * text).log()


def vision_blocks(model: Any) -> list[nn.Module]:
    """The modules of a head's vision blocks."""
    return [block.module for block in model.encoder.vision_tower.blocks]


def predicted_by_command(run: Any, head: Path, paths: list[str]) -> list[list[tuple[str, float]]]:
    """The answers of `dcp-zoo predict`: of each image, the pairs (class, probability)."""
    answers = json.loads(run.ok("predict", *paths, "--head", head, "--json"))
    return [[(p["class"], p["probability"]) for p in answer["predictions"]] for answer in answers]


def state_of_the_process() -> dict[str, object]:
    """What belongs to the user's process and not to a function that it calls."""
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()),
        "algorithms": (torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "pillow": (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES),
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "others": (socket.getdefaulttimeout(), np.geterr(), logging.getLogger().level),
    }


@contextmanager
def process_unchanged(by: str) -> Iterator[None]:
    """Fails if what runs inside, which is called `by`, changes the process."""
    before = state_of_the_process()
    yield
    after = state_of_the_process()
    changed = [what for what in before if before[what] != after[what]]
    assert not changed, f"{by} changed {changed}"
