"""The model: prompt statistics, CLIPs of other shapes, what is trained, and what is rejected."""

import open_clip
import pytest
import reference
import torch
from helpers import Count, close, loud
from shared import build_tiny_clip

from dcp_zoo import DCP, ZooError, create_model
from dcp_zoo.backbone import clip as model_clip
from dcp_zoo.backbone._torch import skip_init
from dcp_zoo.heads.config import COUPLINGS, POOLINGS

NAMES = ["ant", "wild_cat", "crocodile head", "a very long class name with many words", "emu"]
IMAGES = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=COUPLINGS)
def model(request, tiny_clip) -> DCP:
    return loud(DCP(tiny_clip, NAMES, n_ctx=3, depth=2, coupling=request.param)).eval()


CASES = [("bidirectional", "max", True), ("text_to_vision", "first", False)]


@pytest.mark.parametrize(("coupling", "pooling", "share_cmpa"), CASES)
@torch.no_grad()
def test_fast_equals_plain(tiny_clip, coupling, pooling, share_cmpa):
    options = {"coupling": coupling, "pooling": pooling, "share_cmpa": share_cmpa}
    model = loud(DCP(tiny_clip, NAMES, n_ctx=3, depth=9, **options)).eval()
    assert close(model(IMAGES), reference.forward(model, IMAGES))


@pytest.mark.parametrize(("vision", "text"), [(6, 3), (3, 6), (2, 1)])
@torch.no_grad()
def test_towers_of_unequal_depth(golden, vision, text):
    clip = build_tiny_clip(golden, vision_cfg={"layers": vision}, text_cfg={"layers": text})
    model = loud(DCP(clip, NAMES, n_ctx=3)).eval()
    assert model.num_coupled == min(vision, text) - 1
    assert close(model(IMAGES), reference.forward(model, IMAGES))


@torch.no_grad()
def test_calibrated_logits_do_not_depend_on_the_batch(model):
    model.store_stats(IMAGES)
    assert model.stats == "stored"
    together, order = model(IMAGES), torch.tensor([3, 0, 4, 1, 2])
    assert close(model(IMAGES[order]), together[order])
    assert close(torch.cat([model(image[None]) for image in IMAGES]), together)
    scale, text = model.encoder.clip.logit_scale.exp(), model.encode_text()
    assert close(scale * model.encode_image(IMAGES) @ text.T, together)
    assert close(model.encode_text(NAMES[:2]), text[:2])
    model.stats = "batch"
    if model.config.coupling == "bidirectional":
        with pytest.raises(ZooError, match="depend on the images"):
            model.encode_text()


@pytest.mark.parametrize("pooling", POOLINGS)
@torch.no_grad()
def test_calibration_is_one_batch_of_all_images_in_any_chunks(tiny_clip, pooling):
    model = loud(DCP(tiny_clip, NAMES, n_ctx=3, pooling=pooling)).eval()
    as_batch = model(IMAGES)
    for chunks in (IMAGES, IMAGES.split(2), [(IMAGES[:3], None), (IMAGES[3:], None)]):
        model.store_stats(chunks)
        assert model.stored_stats.shape == (3, 3, 128)
        assert close(model(IMAGES), as_batch)


def test_only_prompts_and_cmpa_train(tiny_clip):
    """With no backward pass through the patch embedding."""
    model, seen = DCP(tiny_clip, NAMES).train(), []
    tiny_clip.visual.conv1.register_forward_hook(lambda module, inputs, output: seen.append(output.requires_grad))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(name.startswith(("prompts.", "cmpa.")) for name in trained)
    assert not model.encoder.clip.training
    model(IMAGES).sum().backward()
    assert seen == [False]
    assert all(model.get_parameter(name).grad is not None for name in trained)
    assert all(p.grad is None for p in model.encoder.clip.parameters())


def test_text_prompts_start_from_a_phrase_only_if_it_fits(tiny_clip):
    ids = open_clip.tokenize(["a photo of a"])[0, 1:5]
    four = DCP(tiny_clip, NAMES, n_ctx=4, ctx_init="a photo of a")
    assert torch.equal(four.prompts["text"].data, tiny_clip.token_embedding(ids))
    sixteen = DCP(tiny_clip, NAMES, n_ctx=16, ctx_init="a photo of a").prompts["text"]
    assert 0.015 < sixteen.std() < 0.025


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coupling": "both"}, "bidirectional or text_to_vision"),
        ({"pooling": "median"}, "mean or max or first"),
        ({"classnames": []}, "must not be empty"),
        ({"classnames": ["ant", "None of these"]}, "'None of these' is a reserved name"),
        ({"classnames": "ant"}, "must be a list"),
        ({"dept": 2}, "dept is none of n_ctx, depth, pooling"),
        ({"classnames": ["a " * 55], "n_ctx": 32}, "fewer prompt tokens"),
    ],
)
def test_bad_arguments_get_advice(tiny_clip, changes, message):
    with pytest.raises(ZooError, match=message):
        DCP(tiny_clip, **({"classnames": NAMES} | changes))


def test_warning_for_repeated_names(tiny_clip):
    with pytest.warns(UserWarning, match="'wild cat', 'wild_cat'. They stay classes of their own, which share"):
        DCP(tiny_clip, ["ant", "wild_cat", "wild cat"])


def test_statistics_that_there_are_not(model):
    for stats, message in (("global", "batch, stored"), ("stored", "store_stats")):
        with pytest.raises(ZooError, match=message):
            model.stats = stats
    with pytest.raises(ZooError, match="list or a DataLoader"):
        model.store_stats(iter([IMAGES]))
    for mode in (True, False):
        model.train(mode)
        with pytest.raises(ZooError, match="at least one image"):
            model.store_stats([])
        assert model.training is mode  # a failure restores the mode


def test_unsupported_clip_is_named():
    with skip_init():
        resnet = open_clip.create_model("RN50", pretrained=None)
    with pytest.raises(ZooError, match="class token"):
        DCP(resnet, NAMES)


def test_vits_at_full_size():
    """ViT-L/14 couples eleven of its 24 blocks. Their weights are not under test."""
    with skip_init():
        model = create_model("dcp_vitb16")
        one_way = create_model("dcp_vitb16", coupling="text_to_vision", classnames=NAMES)
        large = create_model("dcp_vitl14", classnames=NAMES, depth=99)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 11_048_448
    assert model.num_classes == 1000
    assert all(type(b.mlp.gelu).__name__ == "QuickGELU" for b in model.encoder.visual.transformer.resblocks)
    assert sum(p.numel() for p in one_way.parameters() if p.requires_grad) < 8_000_000
    assert (len(large.encoder.visual.transformer.resblocks), large.num_coupled) == (24, 11)


def test_every_change_of_the_image_tower_is_noticed(clip, monkeypatch):
    """Also by a write that torch does not count, and where the sum of all weights stays; its weights are read anew only
    then."""
    reads = Count(monkeypatch, model_clip, "fingerprint")
    visual, seen = clip.visual, []
    weight = visual.conv1.weight

    def flip_channels() -> None:
        weight.copy_(weight.flip(1))

    def swap_blocks() -> None:
        first, second = (visual.transformer.resblocks[i].state_dict() for i in (0, 1))
        first = {name: tensor.clone() for name, tensor in first.items()}
        visual.transformer.resblocks[0].load_state_dict(second)
        visual.transformer.resblocks[1].load_state_dict(first)

    def cast() -> None:
        clip.half()

    with torch.no_grad():
        for change in (lambda: None, flip_channels, swap_blocks, lambda: weight.data.mul_(2), cast):
            change()
            seen += [clip.identity(), clip.identity()]
    assert len({*seen}) == len(seen) / 2 == reads.calls
