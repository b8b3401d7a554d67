"""The 11 datasets with three classes and a few images each, and a miniature trained for four steps: `hub/build.py` in
seconds."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import huggingface_hub
import publish
import trees
from PIL import Image
from upload_hub import TOKEN

from dcp_zoo.cli import main
from dcp_zoo.data import DATASETS, list_datasets, packaged
from dcp_zoo.data.packaged import Archive
from dcp_zoo.zoo.registry import MODELS

NAMES = ["red", "green", "blue"]
DEAD = Archive("http://127.0.0.1:9/images.tar")
COUNTS = {"imagenet": (6, 0, 3), "fgvc_aircraft": (3, 3, 3)}
RECIPE = {"epochs": 4, "batch_size": 4}  # every step has all images, so that the loss falls


def shrink(manifest: Path, patch: Any = None) -> None:
    """Make datasets and recipe small, their splits CoOp's, and `manifest` the one that is written; a monkeypatch
    undoes it at the end of a test."""
    put, put_item = (patch.setattr, patch.setitem) if patch else (setattr, dict.__setitem__)
    put(packaged, "_class_names", lambda: dict.fromkeys((spec.names for spec in DATASETS.values()), NAMES))
    put(packaged, "split_rows", lambda name: None)
    put(packaged, "drawn", lambda *args: None)
    put(packaged, "wnid_names", lambda: dict(zip(trees.WNIDS, NAMES, strict=True)))
    put(trees, "WNIDS", trees.WNIDS[:3])
    for name in list_datasets():
        counts = COUNTS.get(name, (6, 3, 3))
        put_item(DATASETS, name, replace(DATASETS[name], num_classes=3, counts=counts, archives=(DEAD,)))
    mini = MODELS["dcp_mini"]
    put_item(MODELS, "dcp_mini", replace(mini, recipe=mini.recipe | RECIPE))
    put(publish, "MANIFEST", manifest)


def draw(path: Path) -> None:
    """A picture, with a colour of its own for every name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = sum(path.stem.encode()) * 37
    Image.new("RGB", (32, 32), (number % 256, number * 7 % 256, number * 3 % 256)).save(path)


def write_data(root: Path) -> None:
    """The 11 datasets in their real layouts; call `shrink` first."""
    for name in list_datasets():
        trees.write_tree(root, name, draw)


def write_manifest(root: Path) -> Path:
    """The empty manifest of a source checkout."""
    path = root / "checkout" / "dcp_zoo" / "zoo" / "heads.json"
    path.parent.mkdir(parents=True)
    (root / "checkout" / "setup.cfg").touch()
    path.write_text("{}")
    return path


# a fork of this process would hang in the first loop that torch splits over threads: it has none of this process's
SERVER = multiprocessing.get_context("forkserver")
SLOW = "open_clip dcp_zoo.training.run dcp_zoo.inspection.inspection dcp_zoo.onnx.export dcp_zoo.prediction.job"
SERVER.set_forkserver_preload(["small_zoo", *SLOW.split()])


def finish_or_kill(
    args: Sequence[str],
    until: Callable[[], bool],
    prepare: Callable[[], object] = list,
    pause: float = 0.0,
    program: str = "dcp_zoo.cli",
) -> bool:
    """Run `dcp-zoo ARGS`, or a script, in a new process, which calls `prepare` first, and kill it so many seconds after
    `until` is true. Whether it had finished before; an error of the command is one here."""
    with NamedTemporaryFile() as said:
        child = SERVER.Process(target=_command, args=(args, prepare, said.name, program))
        child.start()
        while child.exitcode is None:
            if until():
                child.join(pause)
                child.kill()
            child.join(0.01)
        assert child.exitcode <= 0, f"{' '.join(args)} failed: {said.read().decode()}"
        return child.exitcode == 0


def _command(args: Sequence[str], prepare: Callable[[], object], said: str, program: str) -> None:
    with Path(said).open("w") as file, redirect_stdout(file), redirect_stderr(file):
        prepare()
        sys.argv = ["dcp-zoo", *args]
        main(import_module(program).app)


def use_hub(url: str) -> None:
    """What HF_ENDPOINT and a token do in a new process."""
    huggingface_hub.constants.ENDPOINT = url
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    os.environ["HF_TOKEN"] = TOKEN


def prepare_build(manifest: Path, url: str) -> None:
    """For a process that builds heads of small data."""
    shrink(manifest)
    use_hub(url)
