"""Image encoders of timm beside CLIP: through training, files and every deployed form."""

import copy
import json

import pytest
import timm
import torch
from helpers import close, empty_probe, predicted_by_command
from PIL import Image
from safetensors.torch import load_file
from shared import CFG, build_tiny_clip
from timm.models import save_for_hf
from torch.nn import functional as F

from dcp_zoo import FewShotClassifier, create_model, list_labelled_images, predict, train
from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.data import load_image
from dcp_zoo.data.images import crop
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.dcp import DCP
from dcp_zoo.prediction.onnx import OnnxClassifier
from dcp_zoo.release.onnx import export
from dcp_zoo.zoo.build import load_encoder, plain_clip
from dcp_zoo.zoo.factory import create_transform

MODELS = {"convolutional": "test_resnet", "transformer": "test_vit"}  # timm's smallest


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, str]:
    """Folders that hold timm's models with random weights, as `timm.create_model` reads them."""
    places = {}
    for kind, name in MODELS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        save_for_hf(timm.create_model(name), folder, safe_serialization=True)
        places[kind] = f"local-dir:{folder}"
    return places


@pytest.fixture(scope="module")
def pictures(folder) -> tuple[list[Image.Image], list[str]]:
    paths, labels = list_labelled_images(folder)
    return [load_image(path) for path in paths], labels


@pytest.fixture(scope="module")
def head(encoders, pictures):
    return train("dcp_mini", *pictures, encoder=list(encoders.values()))


@torch.no_grad()
def test_an_encoder_reads_clips_pixels_as_timm_would(encoders, pictures):
    """Its features are those of timm's model, of the same crop in its own mean and deviation."""
    clip = plain_clip("dcp_mini")
    pixels = torch.from_numpy(crop(pictures[0][0], clip.pretrained_cfg).copy())
    pixels = pixels if len(pixels) == 3 else pixels.permute(2, 0, 1)
    x = create_transform(clip)(pictures[0][0])[None]
    for encoder in [load_encoder(name, clip) for name in encoders.values()]:
        cfg = encoder.model.pretrained_cfg
        mean, std = (torch.tensor(cfg[name])[:, None, None] for name in ("mean", "std"))
        own = (pixels / 255 - mean) / std
        wanted = encoder.model.forward_head(encoder.model.forward_features(own[None]), pre_logits=True)
        assert encoder.size == (192, 192)
        assert close(encoder.read(x), F.normalize(wanted, dim=-1), 1e-4)
        other = clip.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
        encoder.read_as(other)
        changes = {name: other[name] for name in ("mean", "std")}
        assert close(
            encoder.read(create_transform(clip, **changes)(pictures[0][0])[None]), F.normalize(wanted, dim=-1), 1e-4
        )
        encoder.read_as(clip.pretrained_cfg)


@torch.no_grad()
def test_an_encoder_of_a_fixed_size_without_patches(tmp_path):
    save_for_hf(timm.create_model("test_maxvit"), tmp_path, safe_serialization=True)
    encoder = load_encoder(f"local-dir:{tmp_path}", plain_clip("dcp_mini"))
    assert encoder.size == (160, 160)
    assert encoder.read(torch.ones(2, 3, 192, 192)).shape == (2, *encoder.parts.values())


@torch.no_grad()
def test_a_head_reads_them_through_every_door(head, encoders, pictures, tmp_path):
    images = pictures[0]
    assert [encoder.source for encoder in head.image_encoders] == [*encoders.values()]
    assert head.num_features == sum(head.encoder.parts.values()) + sum(
        e.parts["embedding"] for e in head.image_encoders
    )
    assert head.text_probe.weight[:, sum(head.encoder.parts.values()) :].any()
    x = torch.stack([create_transform(head)(image) for image in images[:4]])
    wanted = head(x)
    assert close(head.encode_image(x).norm(dim=1), torch.ones(4))
    assert close(head.fuse()(x), wanted, 1e-4)
    folder = head.save_pretrained(tmp_path / "head")
    loaded = create_model(str(folder), True).eval()
    assert close(loaded(x), wanted, 1e-4)
    assert not any("image_encoders" in name for name in load_file(folder / "model.safetensors"))
    assert FewShotClassifier.load(folder).encoder == [*encoders.values()]
    names = [found[0].name for found in predict(head, images[:4])]
    assert names == [head.classnames[i] for i in wanted.argmax(-1)]


def test_other_weights_than_those_trained_with_are_refused(head, tmp_path):
    """And the same ones are not: of a head that was saved in half precision."""
    folder = copy.deepcopy(head).half().save_pretrained(tmp_path / "head")
    create_model(str(folder), True)
    config = json.loads((folder / "config.json").read_text())
    said = config["dcp"]["encoders"][0]
    said["fingerprint"] = said["fingerprint"][16:] + said["fingerprint"][:16]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="was trained on other weights"):
        create_model(str(folder), True)


@pytest.mark.scripts
@torch.no_grad()
def test_a_head_beside_an_encoder_is_fused_and_exported(golden, tmp_path, run):
    """Of few blocks, as an export takes seconds; the frozen CLIP is read beside the head's own features."""
    clip = FrozenCLIP(build_tiny_clip(golden, vision_cfg={"layers": 2}, text_cfg={"layers": 2}), pretrained_cfg=CFG)
    size, names, x = (32, 32), ["bus", "cat"], torch.randn(3, 3, 32, 32)
    head = DCP(clip, names, n_ctx=2).eval()
    head.store_stats(x)
    model = timm.create_model("test_vit", num_classes=0, img_size=size, depth=1)
    head.image_encoders.append(ImageEncoder(model, "test_vit", size, clip))
    head.text_probe = empty_probe(head)
    head.text_probe.weight.normal_()
    assert [*head.readings[-1].widths] == [model.num_features]
    assert len(head.readings) == 3
    assert close(head.fuse()(x), head(x), 1e-4)
    path = export(head, tmp_path / "head.onnx")
    assert close(torch.from_numpy(OnnxClassifier(path)(x.numpy())), head(x), 1e-3)
    files = list(sample_images()[:2])
    expected = head(torch.stack([create_transform(head)(load_image(file)) for file in files])).softmax(-1).tolist()
    for row, probabilities in zip(predicted_by_command(run, path, files), expected, strict=True):
        assert dict(row) == pytest.approx(dict(zip(names, probabilities, strict=True)), abs=2e-4)


def test_errors_name_the_choices(head, pictures):
    for options, message in (
        ({"encoder": "vit_smal"}, "timm has no pretrained image model 'vit_smal'.*Nearest: .*timm.list_models"),
        ({"encoder": "test_vit", "method": "zero-shot"}, "read by the text probe: choose --classifier text-probe, or"),
        ({"encoder": "local-dir:/nowhere"}, "cannot be loaded.*downloaded once, by timm: connect to the internet"),
    ):
        with pytest.raises(ZooError, match=message):
            FewShotClassifier(**options).fit(*pictures)
