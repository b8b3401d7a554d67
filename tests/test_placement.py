"""Every public path with the model on a second device: no operation mixes its tensors with the CPU's."""

from collections.abc import Iterator
from unittest.mock import Mock

import pytest
import torch
from convert import convert_cmpa_checkpoint
from PIL import Image
from second_device import second_device
from shared import CFG, COLORS, GOLDEN, build_tiny_clip
from test_baselines import logits_of
from test_method_heads import NONLINEAR, small
from test_tower_kinds import build_clip

import dcp_zoo
from dcp_zoo import DCP, ZooError, load_head
from dcp_zoo.prediction.heads import HeadBackend
from dcp_zoo.probe import candidates
from dcp_zoo.probe import model as probe
from dcp_zoo.release.onnx import export
from dcp_zoo.training.methods import METHODS, fit_head

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SHORT = {"epochs": 2, "batch_size": 12, "n_ctx": 2, "depth": 2, "classifier": "none"}


pytestmark = pytest.mark.filterwarnings("ignore:.*to a meta parameter", "ignore:Training has not converged")


@pytest.fixture
def device(monkeypatch) -> Iterator[torch.device]:
    """The second device, where every operation takes longer: a text probe takes few steps, and need not converge."""
    for module in (candidates, probe):
        monkeypatch.setattr(module, "STEPS", 2)
    with second_device() as device:
        yield device


def test_mixing_is_found(device):
    x = torch.ones(3).to(device)
    assert (x.device, (x + 1).device, (x * torch.tensor(2.0)).cpu().tolist()) == (device, device, [2.0] * 3)
    with pytest.raises(AssertionError, match="aten.add.Tensor mixes"):
        x + torch.ones(3)
    with pytest.raises(AssertionError, match="generator"):
        torch.randn(3, device=device, generator=torch.Generator())


@pytest.mark.parametrize("kind", ["open_clip", "siglip", "clipa", "eva02", "pe"])
def test_towers(kind, golden, device):
    clip, tokenizer = (build_tiny_clip(golden), None) if kind == "open_clip" else build_clip(kind)
    model = DCP(clip.to(device), NAMES, n_ctx=3, tokenizer=tokenizer, ctx_init="a photo of")
    images = IMAGES.to(device)
    model.set_grad_checkpointing(True)
    model(images).sum().backward()
    assert all(p.grad.device == device for p in model.parameters() if p.requires_grad)
    model.store_stats([IMAGES])
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert model.fuse()(images).device == logits.device == device
        assert model.encode_text(NAMES[:2]).device == device
    assert len(model.predict(IMAGES)) == 4


def test_what_a_model_offers(golden, device, tmp_path):
    clip = build_tiny_clip(golden).to(device)
    converted = convert_cmpa_checkpoint(GOLDEN / "model.pth.tar-20", classnames=golden["classnames"], clip=clip)
    converted.store_stats(golden["backbone"]["images"])
    model = DCP(build_tiny_clip(golden).to(device), NAMES, n_ctx=3, depth=2).eval()
    model.store_stats(IMAGES)
    model.pretrained_cfg, images = CFG, IMAGES.to(device)
    with pytest.raises(ZooError, match=r"The model is on meta.*call model.cpu\(\) first"):
        export(model, tmp_path / "x.onnx")
    model.forward_intermediates(images, norm=True)
    model.forward_head(model.forward_features(images))
    assert model.get_classifier().weight.device == device
    HeadBackend(model, features=True).compute(torch.randint(256, IMAGES.shape).to(torch.uint8).numpy())
    for stats in ("batch", "stored"):
        model.stats = stats
        model.predict(IMAGES)
    model.save_pretrained(tmp_path)
    load_head(model, tmp_path)
    model.set_classnames(NAMES[::-1], {name: [f"a {name}.", f"the {name}."] for name in NAMES})
    model.predict(IMAGES)


# methods that do to tensors what others do; DCP is trained below
LIKE_ANOTHER = {"zero-shot-ensemble", "tip-adapter", "vpt-deep", "coop", "clip-svd", "prolip", "dcp"}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in LIKE_ANOTHER])
def test_methods(method, clip, photos, device):
    classifier = "none" if method in NONLINEAR or METHODS[method].abilities.fitted else "text-probe"
    given = small(method, clip.to(device), photos, classifier=classifier)
    head = fit_head(method, given)
    assert logits_of(head, given.val).device == torch.device("cpu")
    assert {t.device for t in head.state_dict().values()} == {device}
    if method == "zero-shot":  # which reads names
        head.set_classnames([*head.classnames, "purple"])
    head.predict(IMAGES)


def test_training_and_prediction(photos, device, tmp_path):
    """In float16, whose state is the largest, of a stopped run."""
    paths, labels = [item.path for item in photos[:3]], [str(COLORS[item.label]) for item in photos[:3]]
    options = {"method": "dcp", "recipe": SHORT, "precision": "float16", "output": tmp_path, "device": device.type}
    with pytest.raises(KeyboardInterrupt):
        dcp_zoo.train("dcp_mini", paths, labels, callbacks=[Mock(side_effect=KeyboardInterrupt)], **options)
    head = dcp_zoo.train("dcp_mini", paths, labels, **options)
    assert head.device == device
    dcp_zoo.evaluate(head, paths, labels)
    dcp_zoo.predict(f"local-dir:{tmp_path}", paths[:2], device=device.type)


def test_a_head_is_on_its_own_device_again_after_it_was_asked_elsewhere(device, tmp_path):
    head, path = dcp_zoo.create_model("dcp_mini.pacs_photo-16shot", True), str(tmp_path / "red.png")
    Image.new("RGB", (200, 200), "red").save(path)
    for door in (dcp_zoo.predict, lambda head, paths, device: dcp_zoo.evaluate(head, paths, ["dog"], device=device)):
        door(head, [path], device=device.type)
        assert {t.device.type for t in (*head.parameters(), *head.buffers())} == {"cpu"}
        assert head.training
