"""The images that a model reads, features of them in bfloat16, and the threads that compute."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import noisy_picture
from torch.nn import functional as F

import dcp_zoo
from dcp_zoo import FewShotClassifier, ZooError, threads
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.features.cache import kept_features
from dcp_zoo.features.device import pick_precision
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import CACHE_BYTES, Photos, pixels_of
from dcp_zoo.features.views import MIRRORED, PLAIN, crop_views
from dcp_zoo.prediction.heads import HeadBackend


@pytest.mark.parametrize("augment", ["crop-flip", "flip"])
def test_two_iterators_over_one_source_do_not_disturb_each_other(augment, clip, photos):
    images = ImageLoader(Photos(photos, CACHE_BYTES), FeatureExtractor(clip), augment)

    def shuffled(seed: int) -> Iterator[torch.Tensor]:
        batches = images.shuffled([4, 4, 4], torch.Generator().manual_seed(seed))
        return (torch.cat([inputs.x.flatten(1), labels[:, None]], 1) for inputs, labels in batches)

    alone = [list(shuffled(seed)) for seed in (1, 2)]
    together = zip(*zip(shuffled(1), shuffled(2), strict=True), strict=True)  # a batch of each in turn
    for expected, found in zip(alone, together, strict=True):
        assert all(map(torch.equal, expected, found))
    assert not torch.equal(alone[0][0], alone[1][0])


def test_a_random_crop_depends_on_its_seed_and_its_image_alone(clip, photos):
    """Not on the other images, nor on torch's random state. A view that was not computed is an error."""
    first, second = crop_views(2, seed=1)
    extract = FeatureExtractor(clip)
    table = extract(Photos(photos), views=(first, second))
    torch.rand(1)
    again = extract(Photos(photos[::-1]), views=(first,))
    torch.testing.assert_close(again.views[first].flip(0), table.views[first])
    assert not torch.allclose(table.views[first], table.views[second], atol=1e-3)
    with pytest.raises(ZooError, match="Features of the view plain were not computed, only of crop"):
        table.rows(PLAIN)


def test_a_part_of_a_table_is_in_the_order_that_was_asked_for(clip, photos):
    table = FeatureExtractor(clip)(Photos(photos), views=(PLAIN, MIRRORED))
    part = table.of([1, 0])
    assert [item.key for item in part.items] == ["1.png", "0.png"]
    assert torch.equal(part.rows(MIRRORED)[0], table.rows(MIRRORED)[0, [1, 0]])
    assert part.labels.tolist() == [1, 0]


def test_a_view_that_is_not_there_is_an_error(clip, photos):
    """Of given features there are those that are given."""
    images = ImageLoader(Photos(photos[:2]), FeatureExtractor(clip))
    given = ImageLoader.of_features(images.table())
    assert torch.equal(given.table().rows(), images.table().rows())
    with pytest.raises(ZooError, match="Features of the view mirrored were not computed, only of plain"):
        given.table(views=(PLAIN, MIRRORED))
    assert given.with_flips == (PLAIN,)


def test_no_image_is_opened_decoded_or_encoded_twice(tmp_path, run, image_work):
    """By no command and no function, from inspecting images to asking a head about others. To leave out what
    a head was trained on, `eval` reads the bytes of a file before it decodes any; pages read the pictures
    that they show again."""
    rng = np.random.default_rng(7)
    colors = {"red": (200, 30, 30), "blue": (30, 30, 200)}
    labels = [*colors] * 6
    known, new = tmp_path / "known", tmp_path / "new"
    paths = [noisy_picture(known / label / f"{i}.png", colors[label], rng) for i, label in enumerate(labels)]
    others = [noisy_picture(new / label / f"{i}.png", colors[label], rng) for i, label in enumerate(labels)]
    contents = [Path(path).read_bytes() for path in others]
    head, prompted, model = tmp_path / "head", tmp_path / "prompted", FewShotClassifier()
    short = ("--method", "dcp", "--set", "epochs=1", "--set", "classifier=none")
    for what, call, opened, decoded, encoded in (
        ("inspect()", lambda: dcp_zoo.inspect(known), 12, 12, 12),
        ("train", lambda: run.ok("train", known, "--output", head), 12, 12, 12),  # their mirror images
        ("train dcp", lambda: run.ok("train", known, *short, "--output", prompted), 12, 12, 24),  # tokens, not features
        ("predict", lambda: run.ok("predict", *others, "--head", head), 12, 12, 12),
        ("eval", lambda: run.ok("eval", new, "--head", head), 24, 12, 12),
        ("search", lambda: run.ok("search", new, "--to-label", "--count", 3), 12, 12, 12),
        ("predict()", lambda: dcp_zoo.predict(str(head), others), 12, 12, 12),
        ("evaluate()", lambda: dcp_zoo.evaluate(str(head), others, labels), 12, 12, 12),
        ("fit", lambda: model.fit(paths, labels), 12, 12, 24),
        ("score", lambda: model.score(paths, labels), 0, 0, 0),
        ("predict", lambda: model.predict(others), 12, 12, 12),
        ("predict_proba", lambda: model.predict_proba(others), 0, 0, 0),
        ("predict bytes", lambda: model.predict(contents), 0, 12, 12),
    ):
        image_work.reset()
        call()
        assert image_work.counts == (opened, decoded, encoded), what


CPU = torch.device("cpu")


@pytest.mark.parametrize("multiplies", [True, False])
def test_auto_is_bfloat16_for_a_real_clip_where_the_processor_multiplies_it(multiplies, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    fast = "bfloat16" if multiplies else "float32"
    found = [pick_precision("auto", name, CPU) for name in ("dcp_vitb16", "open_clip:ViT-B-16/openai")]
    assert found == [fast, fast]
    assert [pick_precision("auto", name, CPU) for name in ("dcp_mini", "custom")] == ["float32"] * 2
    assert pick_precision("float32", "dcp_vitb16", CPU) == "float32"


def test_features_are_kept_by_their_precision(clip, photos):
    with kept_features():
        rounded = FeatureExtractor(clip, "bfloat16")(Photos(photos)).rows()
        exact = FeatureExtractor(clip)(Photos(photos)).rows()
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(exact, FeatureExtractor(clip)(Photos(photos)).rows())
    assert 0 < (exact - rounded).abs().max() < 0.02


def test_logits_are_those_of_rounded_features_exactly(tiny_head):
    """A classifier in bfloat16 would round logits, too."""
    pixels = np.stack([pixels_of(path, tiny_head.pretrained_cfg) for path in sample_images()[:3]])
    found = HeadBackend(tiny_head, features=True, precision="bfloat16").compute(pixels)
    features, (weight, bias) = torch.from_numpy(found.features), tiny_head.linear()
    torch.testing.assert_close(torch.from_numpy(found.logits), F.linear(features, weight, bias), rtol=1e-5, atol=1e-4)
    exact = HeadBackend(tiny_head, features=True, precision="float32").compute(pixels)
    assert 0 < abs(exact.features - found.features).max() < 0.02


def test_functions_choose_the_threads_of_their_own_thread_only():
    """Otherwise one that starts meanwhile keeps what another has set for itself, and all later ones with
    it."""

    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), elsewhere()
    with threads.fair_threads(before[1] + 2):
        assert (torch.get_num_threads(), elsewhere()) == (before[1] + 2, before[1])
    assert (torch.get_num_threads(), elsewhere()) == before


def test_commands_compute_with_the_cores_they_may_use(run, flowers, monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run.ok("train", "MY_PHOTOS", "--shots", "2")
    assert chosen == [3]


def printed(program: str, own: dict[str, str]) -> list[str]:
    """What a program prints of the environment variables, and whether it has imported torch before."""
    env = {name: value for name, value in os.environ.items() if name not in threads.PASSIVE} | own
    show = f"print('torch' in sys.modules, *map(os.environ.get, {[*threads.PASSIVE]}))"
    command = [sys.executable, "-c", f"import os, sys\n{program.format(show=show)}"]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("own", [{}, {"KMP_BLOCKTIME": "200"}])
def test_waiting_threads_of_a_command_sleep_unless_the_user_says_otherwise(own):
    found = printed("from dcp_zoo.cli import main\nmain(lambda: {show})", own)
    assert found == ["False", "passive", own.get("KMP_BLOCKTIME", "0")]


@pytest.mark.scripts  # it imports torch once more
def test_an_import_changes_nothing_in_the_environment():
    """So that it does not matter whether torch or this package comes first."""
    assert printed("import dcp_zoo\ndcp_zoo.FewShotClassifier\n{show}", {}) == ["True", "None", "None"]
