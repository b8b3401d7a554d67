"""The miniature CLIP: its stem against its source package, and its bundled weights."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.backbone.mini import build_mini_clip, cache_sized

# Output of the source package (efficientnet-lite-pytorch) for `smooth_image()`.
REFERENCE = Path(__file__).parent / "data" / "mini_stem.safetensors"


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    return build_mini_clip(MINI_WEIGHTS).eval()


def smooth_image() -> torch.Tensor:
    g = torch.linspace(-1, 1, 128)
    planes = g[:, None] * g, torch.sin(7 * g)[:, None].expand(128, 128), torch.cos(5 * g).expand(128, 128)
    return torch.stack(planes)[None]


def test_bundled_stem_agrees_with_its_source(clip):
    # the file is float16, which alone moves features by one percent; the recipe's test compares in float32
    expected = load_file(REFERENCE)["features"]
    error = clip.visual.conv1.stem(smooth_image())[0] - expected
    assert error.norm() / expected.norm() < 0.02


def test_stem_is_frozen_and_the_same_in_training(clip):
    stem = clip.visual.conv1.stem
    assert not any(p.requires_grad for p in stem.parameters())
    evaluated = stem.eval()(smooth_image())
    assert torch.equal(stem.train()(smooth_image()), evaluated)


def test_a_batch_in_parts_is_the_batch(clip):
    stem, images = clip.visual.conv1.stem, torch.randn(9, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    parts = cache_sized(images)
    assert len(parts) > 1
    assert torch.equal(torch.cat(list(parts)), images)
    torch.testing.assert_close(stem(images), stem.widen(stem.features(images)), rtol=1e-5, atol=1e-5)


def test_without_weights_it_is_random_and_seeded():
    torch.manual_seed(0)
    first = build_mini_clip().state_dict()
    torch.manual_seed(0)
    assert all(torch.equal(first[name], tensor) for name, tensor in build_mini_clip().state_dict().items())
    assert not torch.equal(first["text_projection"], load_file(MINI_WEIGHTS)["text_projection"].float())


def test_weights_are_float16_and_small():
    assert MINI_WEIGHTS.stat().st_size < 40e6
    assert {t.dtype for t in load_file(MINI_WEIGHTS).values()} == {torch.float16}
