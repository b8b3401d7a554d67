"""The images that a model reads, features of them in bfloat16, and the threads that compute."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dcp_zoo import threads
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.prediction import decode
from dcp_zoo.prediction.heads import HeadBackend
from dcp_zoo.training.cache import kept_features
from dcp_zoo.training.device import pick_precision
from dcp_zoo.training.sources import image_source


@pytest.mark.parametrize("augment", ["crop-flip", "flip"])
def test_two_iterators_over_one_source_do_not_disturb_each_other(augment, clip, photos):
    source = image_source(clip, photos, augment)

    def shuffled(seed: int) -> Iterator[torch.Tensor]:
        batches = source.batches(4, torch.Generator().manual_seed(seed))
        return (torch.cat([inputs.x.flatten(1), labels[:, None]], 1) for inputs, labels in batches)

    alone = [list(shuffled(seed)) for seed in (1, 2)]
    together = zip(*zip(shuffled(1), shuffled(2), strict=True), strict=True)  # a batch of each in turn
    for expected, found in zip(alone, together, strict=True):
        assert all(map(torch.equal, expected, found))
    assert not torch.equal(alone[0][0], alone[1][0])


def test_crops_differ_from_pass_to_pass_with_any_number_of_workers(clip, photos):
    """As methods average them, without a generator: they follow torch's random state."""
    found = []
    for workers in (0, 1):
        torch.manual_seed(1)
        source = image_source(clip, photos, "crop-flip", workers)
        found.append([torch.cat([inputs.x for inputs, _ in source.batches(8)]) for _ in range(2)])
    assert not torch.equal(*found[0])
    assert all(map(torch.equal, *found))


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
        rounded = image_source(clip, photos, precision="bfloat16").features()
        exact = image_source(clip, photos).features()
    assert exact.dtype == rounded.dtype == torch.float32
    assert torch.equal(exact, image_source(clip, photos).features())
    assert 0 < (exact - rounded).abs().max() < 0.02


def test_logits_are_those_of_rounded_features_exactly(tiny_head):
    """A classifier in bfloat16 would round logits, too."""
    pixels = np.stack([decode(path, tiny_head.pretrained_cfg) for path in sample_images()[:3]])
    found = HeadBackend(tiny_head, features=True, precision="bfloat16").compute(pixels)
    features, (weight, bias) = torch.from_numpy(found.features), tiny_head.linear()
    torch.testing.assert_close(torch.from_numpy(found.logits), F.linear(features, weight, bias), rtol=1e-5, atol=1e-4)
    exact = HeadBackend(tiny_head, features=True, precision="float32").compute(pixels)
    assert 0 < abs(exact.features - found.features).max() < 0.02


def test_functions_choose_the_threads_of_their_own_thread_only():
    """Otherwise one that starts meanwhile keeps what another has set for itself, and all later ones with it."""

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
