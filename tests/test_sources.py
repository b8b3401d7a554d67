"""The images that a model reads."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.training.sources import image_source, seeded


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


class TwoDevices:
    """In place of `torch.cuda`, with a generator for each of two devices, of which the first is the current one."""

    def __init__(self) -> None:
        self.default_generators = [torch.Generator().manual_seed(i) for i in range(2)]
        self.current = 0

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        before, self.current = self.current, device.index
        yield
        self.current = before

    def at(self, device: torch.device | None = None) -> torch.Generator:
        return self.default_generators[self.current if device is None else device.index]

    def manual_seed(self, seed: int) -> None:
        self.at().manual_seed(seed)

    def get_rng_state(self, device: torch.device | None = None) -> torch.Tensor:
        return self.at(device).get_state()

    def set_rng_state(self, state: torch.Tensor, device: torch.device | None = None) -> None:
        self.at(device).set_state(state)


def test_the_chosen_gpu_is_seeded_not_the_current_one(monkeypatch):
    devices = TwoDevices()
    monkeypatch.setattr(torch, "cuda", devices)

    def states() -> list[bytes]:
        of_devices = [generator.get_state() for generator in devices.default_generators]
        return [bytes(state) for state in (*of_devices, torch.get_rng_state())] + [np.random.get_state()[1].tobytes()]

    before, drawn = states(), []
    for _ in range(2):
        with seeded(5, torch.device("cuda", 1)):
            drawn.append(float(torch.rand(1, generator=devices.default_generators[1])))
            assert states()[0] == before[0], "the other device"
            assert devices.current == 0
        assert states() == before
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(("device", "workers", "pinned"), [("cuda", 1, True), ("cuda", 0, False), ("cpu", 1, False)])
def test_workers_of_a_gpu_read_into_pinned_memory(clip, photos, monkeypatch, device, workers, pinned):
    monkeypatch.setattr(FrozenCLIP, "device", torch.device(device))
    assert image_source(clip, photos, "crop-flip", workers).batches(2).pin_memory == pinned
