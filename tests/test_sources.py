"""Datasets from elsewhere: the Hub, through the real `datasets` and a real Hub; and the images
that a model reads."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers import offline, use_endpoint
from hub_server import Hub, serve
from PIL import Image

from dcp_zoo.data import few_shot, load_image, load_split
from dcp_zoo.data.tables import _builder, _split_images, _splits
from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.inputs import Inputs
from dcp_zoo.training.sources import image_source

NAMES = ["cat", "dog"]


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def level_of(path: str) -> int:
    """The grey level of an item's image, which identifies it in the tests."""
    return int(np.asarray(load_image(path))[0, 0, 0])


# --- the Hub ---------------------------------------------------------------------------------------------------------


def write_parquet(file: Path, columns: dict[str, object]) -> None:
    """One split: one column per feature, images and labels as the Hub's types, text as text."""
    datasets = pytest.importorskip("datasets")
    kinds = {"img": datasets.Image(), "photo": datasets.Image(), "coarse": datasets.ClassLabel(names=["pet"])}
    kinds["label"] = datasets.ClassLabel(names=NAMES)
    features = {
        k: kinds.get(k) or datasets.Value("string" if isinstance(v[0], str) else "int64") for k, v in columns.items()
    }
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(file)


def pets(start: int, size: int) -> dict[str, list]:
    return {"img": [grey(start + i) for i in range(size)], "label": [i % 2 for i in range(size)]}


REPOS = {  # repo: split: columns
    "zoo/pets": {"train": pets(0, 8), "validation": pets(20, 4), "test": pets(40, 6)},
    "zoo/half": {"train": pets(0, 8), "validation": pets(20, 4)},
    "zoo/lone": {"full": pets(0, 20)},
    "zoo/hidden": {"train": pets(0, 8), "validation": pets(20, 4), "test": pets(40, 2) | {"label": [-1, -1]}},
    "zoo/text": {"train": {"photo": [grey(1), grey(2)], "label_text": ["dog", "cat"], "id": [1, 2]}},
    "zoo/two": {"train": pets(0, 4) | {"coarse": [0] * 4}},
    "zoo/numbers": {"train": {"img": [grey(0)] * 4, "kind": [0, 1, 0, 1]}},
    "zoo/gap": {"train": pets(0, 4) | {"label": [0, 1, -1, 0]}},
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[Hub]:
    datasets = pytest.importorskip("datasets")
    root = tmp_path_factory.mktemp("hub")
    patch = pytest.MonkeyPatch()
    with serve(root) as server:
        for repo, splits in REPOS.items():
            files = {"README.md": root / "README.md"}
            files["README.md"].write_text("---\nlicense: mit\n---\n")
            for split, columns in splits.items():
                files[f"{split}-00000-of-00001.parquet"] = root / f"{split}.parquet"
                write_parquet(root / f"{split}.parquet", columns)
            server.commit = server.add(repo, files, tag="v1", kind="datasets")
        use_endpoint(patch, server.url, root / "hub-cache")
        patch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
        datasets.disable_progress_bars()
        yield server
        patch.undo()


def levels(items: list) -> list[int]:
    return [level_of(item.path) for item in items]


def test_hub_split(hub):
    split = load_split("hf://datasets/zoo/pets")
    assert split.classnames == NAMES
    for part, expected in ((split.train, range(8)), (split.val, range(20, 24)), (split.test, range(40, 46))):
        assert levels(part) == list(expected)
    assert [item.label for item in split.test] == [0, 1] * 3
    assert split.note == "Images from column img, classes from label."
    assert load_split(split.name) == split  # it names the commit
    assert split.test[2].key == split.name.split("@")[1].split("?")[0] + "/test/2"
    assert load_split("hf://datasets/zoo/pets@v1:default?image=img").sha256 == split.sha256
    assert Counter(item.label for item in few_shot(split, 2, 1).train) == {0: 2, 1: 2}


@pytest.mark.parametrize(
    ("name", "sizes", "note"),
    [
        ("zoo/half", (8, 0, 4), "no test part: testing on the validation part"),
        ("zoo/lone", (10, 4, 6), "no test part: split 50/20/30 within each class"),
        ("zoo/hidden", (8, 0, 4), "Left out: test."),
    ],
)
def test_hub_without_a_test_part(hub, name, sizes, note):
    split = load_split(f"hf://datasets/{name}")
    assert (len(split.train), len(split.val), len(split.test)) == sizes
    assert note in split.note
    assert len(set(levels(split.items))) == len(split.items)


def test_hub_classes_from_text(hub):
    with pytest.raises(ZooError, match=r"the label column.*label_text \(string\), id \(int64\).*label=COLUMN"):
        load_split("hf://datasets/zoo/text")
    assert set(load_split("hf://datasets/zoo/text?label=label_text").classnames) == {"cat", "dog"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://zoo/pets", r"is not the name of a Hub dataset: use hf://datasets/ORG/NAME\[@REVISION\]"),
        ("hf://datasets/zoo/pets?split=train", "is not the name of a Hub dataset"),
        ("hf://datasets/zoo/none", "has no repo datasets/zoo/none, or it is private"),
        ("hf://datasets/zoo/pets@v9", "v9|has no repo"),
        ("hf://datasets/zoo/pets:other", "BuilderConfig 'other' not found. Available: .*default"),
        ("hf://datasets/zoo/two", r"the label column.*img \(.*\), label \(int64\), coarse"),
        ("hf://datasets/zoo/two?label=img", "cannot determine the label column"),
        ("hf://datasets/zoo/pets?image=label", "cannot determine the image column"),
        ("hf://datasets/zoo/numbers?label=kind", "cannot determine the label column"),
        ("hf://datasets/zoo/gap", "row 2 of train has the label -1"),
    ],
)
def test_hub_rejects(hub, name, message):
    with pytest.raises(ZooError, match=message):
        load_split(name)


def test_hub_out_of_reach(hub, monkeypatch):
    split = load_split("hf://datasets/zoo/pets")
    for remembered in (_builder, _splits, _split_images):
        remembered.cache_clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ZooError, match=r"datasets/zoo/pets at http://127.0.0.1:9: .*HF_ENDPOINT"):
        load_split("hf://datasets/zoo/pets")
    with offline():
        assert load_split("hf://datasets/zoo/pets") == split  # from the cache
        assert load_split(split.name) == split
        with pytest.raises(ZooError, match="offline, only the commit"):
            load_split("hf://datasets/zoo/pets@v1")


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    _builder.cache_clear()
    with offline(), pytest.raises(ZooError, match=r"This needs datasets .*pip install 'dcp_zoo\[data\]'"):
        load_split("hf://datasets/zoo/pets")


# --- image sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["crop-flip", "flip"])
def test_two_iterators_over_one_source_do_not_disturb_each_other(augment, clip, photos):
    source = image_source(clip, photos, augment)

    def shuffled(seed: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
        return iter(source.batches(4, torch.Generator().manual_seed(seed)))

    alone = [list(shuffled(seed)) for seed in (1, 2)]
    together = zip(*zip(shuffled(1), shuffled(2), strict=True), strict=True)  # a batch of each in turn
    for expected, found in zip(alone, together, strict=True):
        for (inputs, labels), (others, other_labels) in zip(expected, found, strict=True):
            assert torch.equal(inputs.x, others.x)
            assert torch.equal(labels, other_labels)
    assert not torch.equal(alone[0][0][0].x, alone[1][0][0].x)


def test_crops_differ_from_pass_to_pass_with_any_number_of_workers(clip, photos):
    """As methods average them, without a generator: they follow torch's random state."""
    found = []
    for workers in (0, 1):
        torch.manual_seed(1)
        source = image_source(clip, photos, "crop-flip", workers)
        found.append([torch.cat([inputs.x for inputs, _ in source.batches(8)]) for _ in range(2)])
    assert not torch.equal(*found[0])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("device", "workers", "pinned"), [("cuda", 1, True), ("cuda", 0, False), ("cpu", 1, False)])
def test_workers_of_a_gpu_read_into_pinned_memory(clip, photos, monkeypatch, device, workers, pinned):
    monkeypatch.setattr(FrozenCLIP, "device", torch.device(device))
    assert image_source(clip, photos, "crop-flip", workers).batches(2).pin_memory == pinned
