"""Fixtures for all tests."""

import json
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from filelock import FileLock
from helpers import loud, photo, process_unchanged, rejecting, use_endpoint, write_weights
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from typer import Typer
from upload_hub import TOKEN, UploadHub, serve_uploads

from dcp_zoo import DCP
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.tokens import default_tokenizer
from dcp_zoo.cli import app, main
from dcp_zoo.data import Item
from dcp_zoo.hub import CLIP_WEIGHTS_NAME
from dcp_zoo.release import onnx
from dcp_zoo.training.methods import prompts
from dcp_zoo.zoo.build import build_open_clip
from dcp_zoo.zoo.registry import WEIGHTS

BUNDLED = "dcp_mini.caltech101-1shot"
GOLDEN = Path(__file__).parent / "golden" / "cmpa"
COLORS = ((200, 30, 30), (30, 30, 200), (20, 90, 20))
CFG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5,) * 3,
    "std": (0.3,) * 3,
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@contextmanager
def printed_warnings() -> Iterator[None]:
    """Warnings that are errors in tests are none in a command, which prints them."""
    with warnings.catch_warnings():
        warnings.filters[:] = [("always" if action == "error" else action, *rest) for action, *rest in warnings.filters]
        yield


class CommandLine:
    """Calls `dcp-zoo` or a script in this process: exit code, stdout and stderr, without colours and line
    breaks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, program: Typer = app) -> None:
        self.monkeypatch, self.capsys, self.program = monkeypatch, capsys, program

    def __call__(self, *args: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr("sys.argv", ["dcp-zoo", *map(str, args)])
        self.monkeypatch.setenv("COLUMNS", "250")
        self.capsys.readouterr()  # what was printed before, as by torch's exporter, is not the command's
        with printed_warnings(), pytest.raises(SystemExit) as stop:
            main(self.program)
        out, err = self.capsys.readouterr()
        return stop.value.code or 0, re.sub(r"\x1b\[[0-9;]*m", "", out), re.sub(r"\s+", " ", err)

    def ok(self, *args: object) -> str:
        """The output of a command that succeeds."""
        code, out, err = self(*args)
        assert code == 0, err
        return out

    def refused(self, *args: object) -> str:
        """The error of a command that is refused."""
        code, out, err = self(*args)
        assert code == 2, out + err
        return err


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait come first: one process runs them all, while the others compute, and starts Ray
    and Chromium once."""
    first = ["test_build.py", "test_ray.py", "test_pages.py"]
    items.sort(key=lambda item: [*first, item.path.name].index(item.path.name))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A Hub that takes uploads. This process's client uses it, is logged in, and starts with an empty
    cache."""
    with serve_uploads() as hub:
        use_endpoint(monkeypatch, hub.url, tmp_path / "cache")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("DCP_ZOO_HUB_ORG", raising=False)
        yield hub


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The empty manifest of a source checkout, which `hub/build.py` writes."""
    path = tmp_path / "checkout" / "dcp_zoo" / "zoo" / "heads.json"
    path.parent.mkdir(parents=True)
    (tmp_path / "checkout" / "setup.cfg").touch()
    path.write_text("{}")
    monkeypatch.setattr("build.MANIFEST", path)
    return path


@pytest.fixture(scope="session")
def golden() -> dict:
    """`meta.json` of the golden vectors, with the backbone's tensors under "backbone"."""
    return json.loads((GOLDEN / "meta.json").read_text()) | {"backbone": load_file(GOLDEN / "backbone.safetensors")}


@pytest.fixture
def tiny_clip(golden: dict) -> open_clip.CLIP:
    """The golden vectors' small CLIP: 4 + 4 blocks, widths 128 (vision) and 64 (text), images of 32
    pixels."""
    return build_tiny_clip(golden)


BUILT: dict[str, tuple[open_clip.CLIP, torch.Tensor]] = {}


def build_tiny_clip(golden: dict, **changes: dict) -> open_clip.CLIP:
    """A copy of the golden CLIP; with changes such as `vision_cfg={"layers": 6}` it keeps random weights.
    The random state is as if it had just been built from seed 0."""
    key = json.dumps(changes, sort_keys=True)
    if key not in BUILT:
        torch.manual_seed(0)
        cfg = {k: (v | changes.get(k, {}) if isinstance(v, dict) else v) for k, v in golden["clip"].items()}
        clip = open_clip.CLIP(**cfg)
        if not changes:
            state = {k: v for k, v in golden["backbone"].items() if k != "images"}
            table = torch.zeros_like(clip.token_embedding.weight)
            table[state.pop("token_embedding.ids")] = state.pop("token_embedding.rows")
            clip.load_state_dict(state | {"token_embedding.weight": table})
        BUILT[key] = clip.eval(), torch.get_rng_state()
    clip, state = BUILT[key]
    torch.set_rng_state(state)
    return deepcopy(clip)


SMALL_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "head_width": 32, "layers": 3},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a model in a folder: a CLIP of few and narrow blocks with random weights, for images of 32
    pixels. It trains and answers in a tenth of the miniature's time."""
    folder = tmp_path_factory.mktemp("small") / "clip"
    folder.mkdir()
    torch.manual_seed(0)
    state = build_open_clip(SMALL_CLIP, quick_gelu=False).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / CLIP_WEIGHTS_NAME)
    described = {"model_cfg": SMALL_CLIP, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return f"open_clip:local-dir:{folder}"


@pytest.fixture
def clip(golden, monkeypatch) -> FrozenCLIP:
    """The small CLIP, for which PromptSRC averages 3 templates in place of 60."""
    monkeypatch.setattr(prompts, "TEMPLATES", prompts.TEMPLATES[:3])
    return FrozenCLIP(build_tiny_clip(golden, text_cfg={"layers": 4}), default_tokenizer(), CFG)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Item]:
    """Four noisy pictures of each of three colours, the same in every process."""
    folder, items, rng = tmp_path_factory.mktemp("photos"), [], np.random.default_rng(0)
    for i in range(12):
        noise = Image.fromarray(rng.normal(128, 60, (36, 40)).clip(0, 255).astype(np.uint8)).convert("RGB")
        path = folder / f"{i}.png"
        Image.blend(Image.new("RGB", (40, 36), COLORS[i % 3]), noise, 0.4).save(path)
        items.append(Item(str(path), path.name, i % 3))
    return items


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Four blue and four red pictures, one folder per class."""
    place = tmp_path_factory.mktemp("colours")
    for name, color in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
        (place / name).mkdir()
        for i in range(4):
            image = Image.new("RGB", (150, 140), tuple(min(255, part + 9 * i) for part in color))
            image.save(place / name / f"{i}.png")
    return place


@pytest.fixture(scope="session")
def tiny_head(golden: dict) -> DCP:
    """A calibrated DCP of four classes on a CLIP of few blocks, as an export takes seconds. It rejects
    images, and its parameters are perturbed so that answers differ."""
    small = build_tiny_clip(golden, vision_cfg={"layers": 2}, text_cfg={"layers": 2})
    clip = FrozenCLIP(small, pretrained_cfg=CFG)
    torch.manual_seed(3)
    model = loud(DCP(clip, ["ant", "wild_cat", "crocodile head", "emu"], n_ctx=3, depth=2))
    model.store_stats(torch.randn(6, *CFG["input_size"], generator=torch.Generator().manual_seed(0)))
    return rejecting(model.eval())


@pytest.fixture(scope="session")
def onnx_file(tiny_head: DCP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_head`, exported, which takes seconds: once for all workers."""
    for module in ("onnxruntime", "onnxscript"):
        pytest.importorskip(module, reason="the export extra is not installed")

    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "tiny.onnx"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with process_unchanged("export"):
                onnx.export(tiny_head, path)
    return path


@pytest.fixture(scope="module")
def exported_once(onnx_file: Path) -> Iterator[None]:
    """Other exports of `tiny_head` begin with a copy of `onnx_file`, as torch's exporter takes seconds."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx, "write_onnx", lambda fused, path, images: shutil.copy(onnx_file, path))
        yield


@pytest.fixture(scope="module")
def chromium():
    """A running Chromium; the test is skipped without one."""
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=path, args=[*flags, "--disable-component-update", "--disable-sync"]
        )
        yield browser
        browser.close()


@pytest.fixture
def flowers(tmp_path, monkeypatch) -> Path:
    """The working folder, with MY_PHOTOS in it: two classes of six photographs."""
    monkeypatch.chdir(tmp_path)
    for name in ("rose", "tulip"):
        for i in range(6):
            photo(tmp_path / "MY_PHOTOS" / name / f"{i}.jpg", i)
    return tmp_path / "MY_PHOTOS"


@pytest.fixture
def my_head(tmp_path, monkeypatch) -> Path:
    """A checkpoint folder in the working folder, as training on MY_PHOTOS writes it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WEIGHTS / BUNDLED, tmp_path / "my_head")
    path = tmp_path / "my_head" / "config.json"
    config = json.loads(path.read_text())
    config["label_names"] = ["rose", "tulip"]
    config["dcp"] |= {"dataset": "folder", "shots": 3}
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "my_head" / "model.safetensors")
    write_weights(path.parent, {name: t for name, t in tensors.items() if "classifier" not in name})  # of other classes
    return tmp_path / "my_head"


@dataclass
class ImageWork:
    """What was done with images since the last `reset`: files that were opened, by their paths, and how many
    images were decoded and encoded by CLIP."""

    opened: Counter[str] = field(default_factory=Counter)
    decoded: int = 0
    encoded: int = 0

    def reset(self) -> None:
        self.opened.clear()
        self.decoded = 0
        self.encoded = 0

    @property
    def counts(self) -> tuple[int, int, int]:
        return sum(self.opened.values()), self.decoded, self.encoded


WATCHING: list[ImageWork] = []  # Python cannot remove an audit hook: without an entry, it does nothing


def note_opened(event: str, arguments: tuple) -> None:
    if WATCHING and event == "open" and str(arguments[0]).endswith((".jpg", ".png")):
        WATCHING[0].opened[str(arguments[0])] += 1


sys.addaudithook(note_opened)


@pytest.fixture
def image_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageWork]:
    """Counts images that are opened, decoded and encoded: by the system, by PIL, and by the first layer of a
    tower."""
    work = ImageWork()
    load = ImageFile.ImageFile.load

    def count_decoded(image: ImageFile.ImageFile) -> object:
        if image.tile:  # what is left to decode
            work.decoded += 1
        return load(image)

    def count_encoded(layer: nn.Module, inputs: tuple) -> None:
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            work.encoded += len(inputs[0])

    monkeypatch.setattr(ImageFile.ImageFile, "load", count_decoded)
    hook = register_module_forward_pre_hook(count_encoded)
    WATCHING.append(work)
    yield work
    WATCHING.remove(work)
    hook.remove()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Commands keep features here, not in the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCP_ZOO_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Fails the test when a model or a dataset is loaded."""

    def work(*args, **options):
        pytest.fail("the error should have come first")

    for name in ("zoo.factory.create_model", "data.load.load_labelled", "benchmark.sweep.sweep"):
        monkeypatch.setattr(f"dcp_zoo.{name}", work)
