"""timm as the host: its functions, names and scripts on the zoo's models, and how its training handles their
state.

Passes with timm 1.0.21, 1.0.28 and 1.0.31. `hf-hub:` names are in test_hub.py, which runs a Hub.
"""

import ast
import copy
import importlib
import inspect
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import model_stubs
import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from helpers import loud, vision_blocks
from PIL import Image
from shared import build_tiny_clip
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

import dcp_zoo
from dcp_zoo import DCP, ZooError, models
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.heads.kinds import PromptHead
from dcp_zoo.zoo.registry import all_heads, trained_heads
from dcp_zoo.zoo.specs import MODELS

DEFAULT = "dcp_mini.caltech101-16shot"
HEADS = (next(name for name in trained_heads() if name != DEFAULT), DEFAULT)  # both bundled
SIZE = MODELS["dcp_mini"].image_size
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> dcp_zoo.DCP:
    return timm.create_model(HEADS[1], pretrained=True).eval()


def same(a: dcp_zoo.DCP, b: dcp_zoo.DCP) -> bool:
    return torch.equal(a.prompts["text"], b.prompts["text"])


def test_names_and_configs():
    for options in (
        {},
        {"module": "dcp"},
        {"exclude_filters": "*b16"},
        {"name_matches_cfg": True},
        {"include_tags": True},
    ):
        assert timm.list_models("dcp*", **options) == dcp_zoo.list_models("dcp*", **options), options
    assert set(dcp_zoo.list_models()) == set(MODELS)
    for name, head in all_heads().items():
        cfg = timm.models.get_pretrained_cfg(name)
        assert bool(cfg.has_weights) == (head.status != "planned")
        assert (cfg.architecture, cfg.tag) == (head.model, head.tag)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "num_classes", "tag")
    for name, spec in MODELS.items():
        cfg, ours = timm.get_pretrained_cfg(name).to_dict(), dcp_zoo.get_pretrained_cfg(name)
        assert {key: cfg[key] for key in keys} == {key: ours[key] for key in keys}, name
        assert (ours["tag"], ours["input_size"]) == (spec.default_tag, (3, spec.image_size, spec.image_size)), name
    loadable = dcp_zoo.list_models(pretrained=True)
    assert dcp_zoo.list_pretrained() == loadable
    assert timm.list_pretrained("dcp*") == timm.list_models("dcp*", pretrained=True) == loadable
    assert dcp_zoo.list_models(pretrained=True, include_tags=False) == timm.list_models(
        "dcp*", "", True, "", False, False
    )
    assert dcp_zoo.get_pretrained_cfg_value(DEFAULT, "crop_pct") == timm.get_pretrained_cfg_value(DEFAULT, "crop_pct")
    assert dcp_zoo.get_pretrained_cfg_value(DEFAULT, "none") is None
    for name in MODELS:
        found, ours = timm.get_pretrained_cfg(f"{name}.clip").to_dict(), dcp_zoo.get_pretrained_cfg(f"{name}.clip")
        assert {key: found.get(key) for key in ours} == ours | {"fixed_input_size": True}, name
        assert timm.is_model_pretrained(f"{name}.clip")
    cfg = timm.models.get_pretrained_cfg(planned := "dcp_vitl14_336.food101-2shot")
    assert (cfg.num_classes, cfg.hf_hub_id, cfg.url, cfg.file, cfg.source) == (101, None, None, None, None)
    assert dcp_zoo.get_pretrained_cfg(planned)["hf_hub_id"] == f"dcp-zoo/{planned}"


def test_every_way_to_name_a_head_loads_that_head(model):
    name = HEADS[0]
    expected = dcp_zoo.create_model(name, True)
    tag = name.split(".")[1]
    assert same(timm.create_model("dcp_mini", pretrained=tag), expected)
    assert same(timm.create_model("dcp_mini", pretrained=True, pretrained_cfg=tag), expected)
    cfg = timm.models.get_pretrained_cfg(name)
    assert same(timm.create_model("dcp_mini", pretrained=True, pretrained_cfg=cfg), expected)
    assert same(timm.create_model("dcp_mini", pretrained=True), model)
    assert not same(model, expected)
    assert same(dcp_zoo.create_model(model_name="dcp_mini", pretrained=True, pretrained_cfg=tag), expected)
    assert same(dcp_zoo.create_model(DEFAULT, True, pretrained_cfg=cfg), expected)  # it precedes the name's, as in timm
    assert same(models.dcp_mini(pretrained=tag), expected)
    with pytest.raises(ZooError, match="names no head of dcp_mini. Pass a tag"):
        dcp_zoo.create_model("dcp_mini", True, pretrained_cfg={"crop_pct": 0.9})
    for wrong in ({"pretrained": "cars-3shot"}, {"pretrained_cfg": "cars-3shot", "pretrained": True}):
        with pytest.raises(ZooError, match="has no head 'cars-3shot'"):
            timm.create_model("dcp_mini", **wrong)


def test_models_are_functions_to_import():
    """In `dcp_zoo.models`, whose functions are those that timm has."""
    assert models.__all__ == list(MODELS)
    for name in models.__all__:
        function = getattr(models, name)
        assert function.__name__ == name
        assert function is timm.model_entrypoint(name) is dcp_zoo.model_entrypoint(f"{name}.any-tag")


def test_torch_hub_finds_the_models():
    head = torch.hub.load(str(Path(__file__).parents[1]), "dcp_mini", source="local", pretrained="caltech101-16shot")
    assert head.num_classes == 100


def test_editors_find_a_function_of_each_model():
    """In the stub, with its signature; after a change of the table or of `create_model`: python
    hub/model_stubs.py."""
    assert model_stubs.STUB.read_text() == model_stubs.stub()
    functions = {node.name: node for node in ast.parse(model_stubs.stub()).body if isinstance(node, ast.FunctionDef)}
    assert list(functions) == list(MODELS)
    expected = [name for name in inspect.signature(dcp_zoo.create_model).parameters if name != "model_name"]
    for function in functions.values():
        parameters = [*function.args.args, *function.args.kwonlyargs, function.args.kwarg]
        assert [parameter.arg for parameter in parameters] == expected


def test_local_dir(tmp_path, model):
    model.save_pretrained(tmp_path)
    overlay = {"file": f"{tmp_path}/model.safetensors"}
    assert same(timm.create_model("dcp_mini", pretrained=True, pretrained_cfg_overlay=overlay), model)
    named = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, classnames=["cat", "dog"])
    assert same(named, model)
    assert named.pretrained_cfg["label_names"] == ["cat", "dog"]
    config = json.loads((tmp_path / "config.json").read_text())  # which cannot lead elsewhere
    config["pretrained_cfg"] |= {"file": "/etc/passwd", "url": "http://127.0.0.1:9/x", "hf_hub_id": "evil/repo"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


@torch.inference_mode()
def test_timm_saves_what_timm_can_load(tmp_path, model):
    assert timm.models._hub.save_for_hf is timm.models.save_for_hf  # of `push_to_hf_hub`
    timm.models.save_for_hf(model, tmp_path / "head", safe_serialization="both")
    again = timm.create_model(f"local-dir:{tmp_path / 'head'}", pretrained=True).eval()
    torch.testing.assert_close(again(IMAGES), model(IMAGES))
    timm.models.save_for_hf(timm.create_model("test_vit"), tmp_path / "vit")
    assert sorted(path.name for path in (tmp_path / "vit").iterdir()) == ["config.json", "pytorch_model.bin"]


def test_data_config_and_transform(model, tmp_path):
    cfg = resolve_model_data_config(model)
    assert cfg["input_size"] == (3, SIZE, SIZE)
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["crop_mode"]) == (1.0, "bicubic", "center")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 290, 3), dtype=np.uint8))
    ours = dcp_zoo.create_transform(model)(image)
    assert torch.equal(create_transform(**cfg, is_training=False)(image), ours)
    assert torch.equal(dcp_zoo.create_transform(**cfg)(image), ours)
    wider = dcp_zoo.create_transform(model, crop_pct=0.8)(image)
    assert torch.equal(create_transform(**cfg | {"crop_pct": 0.8}, is_training=False)(image), wider)
    for changes, message in (({}, "needs input_size, interp"), (cfg | {"scale": 1}, "Unknown change 'scale'")):
        with pytest.raises(ZooError, match=message):
            dcp_zoo.create_transform(**changes)
    assert isinstance(model.get_submodule(model.default_cfg["first_conv"]), torch.nn.Conv2d)
    assert getattr(model, model.default_cfg["classifier"]) is model.text_probe
    assert dcp_zoo.create_model(DEFAULT, True, classifier="none").default_cfg["classifier"] == ()  # names are read
    changed = timm.create_model("dcp_mini", "clip", pretrained_cfg_overlay={"crop_pct": 0.875})
    saved = timm.create_model(f"local-dir:{changed.save_pretrained(tmp_path)}", pretrained=True)
    assert resolve_model_data_config(saved) == resolve_model_data_config(changed)
    assert resolve_model_data_config(saved)["crop_pct"] == 0.875
    found = dcp_zoo.evaluate(changed, [image], [changed.classnames[0]]).logits
    torch.testing.assert_close(found, changed(dcp_zoo.create_transform(changed)(image)[None]))


@torch.inference_mode()
def test_features_the_head_and_another_classifier():
    """From names to features, to other names, to a fresh classifier, and back: nothing that was trained is
    lost."""
    head = timm.create_model(DEFAULT, pretrained=True).eval()
    names, logits, head.info = head.classnames, head(IMAGES), {"metrics": {"top1": 50.0}}
    features = head.forward_features(IMAGES)
    assert features.shape == (2, head.num_features) == (2, head.head_hidden_size)
    assert torch.equal(head.forward_head(features, pre_logits=True), features)
    torch.testing.assert_close(head.forward_head(features), logits)
    layer = head.get_classifier()
    torch.testing.assert_close(layer(features), logits)
    assert not torch.allclose(
        logits, torch.nn.functional.linear(features, *head.linear()), atol=0.1
    )  # without the gate
    layer.gate.zero_()
    torch.testing.assert_close(head(IMAGES), logits)
    assert head.get_classifier() is not head.get_classifier()  # computed from the names and the text probe
    with pytest.raises(ZooError, match="num_classes=3, but there are 2 class names"):
        dcp_zoo.create_model(DEFAULT, True, num_classes=3, classnames=["cat", "dog"])
    head.reset_classifier(0)
    assert torch.equal(head(IMAGES), features)
    assert isinstance(head.get_classifier(), torch.nn.Identity)
    head.reset_classifier(names)
    assert head.info == {"metrics": {"top1": 50.0}}
    torch.testing.assert_close(head(IMAGES), logits)
    head.reset_classifier(["cat", "dog"])
    assert (head.classnames, head(IMAGES).shape) == (["cat", "dog"], (2, 2))
    for count in (7, 0, 7):
        head.reset_classifier(count)
        assert head(IMAGES).shape == (2, count or head.num_features)
    assert "metrics" not in head.info
    for wrong in ([], ["cat", ""], -1, 2.5):
        with pytest.raises((ZooError, TypeError)):
            head.reset_classifier(wrong)
        assert head.fc is not None, "the layer, which may be trained, is still there"
    head.classes = [*"abcdefg"]
    assert head.classnames == [*"abcdefg"]
    head.reset_classifier(names)
    torch.testing.assert_close(head(IMAGES), logits)
    with pytest.raises(ZooError, match="set_classnames"):  # logits would have the wrong names
        head.classes = names[::-1]
    head.classes.reverse()
    assert head.classnames == names


@pytest.fixture(scope="module")
def five() -> dcp_zoo.DCP:
    """A head whose classifier was replaced as in timm's fine-tuning scripts, and trained by a plain loop."""
    model, losses = timm.create_model(DEFAULT, pretrained=True, num_classes=5), []
    layer, before = model.get_classifier(), model.get_classifier().weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(4):
        loss = torch.nn.functional.cross_entropy(model.train()(IMAGES), torch.arange(len(IMAGES)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.get_classifier() is layer is getattr(model, model.default_cfg["classifier"])
    assert not torch.equal(layer.weight, before)
    return model.eval()


@torch.inference_mode()
def test_a_fresh_classifier_answers_through_every_door(five, tmp_path):
    logits = five(IMAGES)
    torch.testing.assert_close(five.forward_head(five.forward_features(IMAGES)), logits)
    torch.testing.assert_close(five.get_classifier()(five.forward_features(IMAGES)), logits)
    torch.testing.assert_close(five.fuse()(IMAGES), logits, rtol=1e-4, atol=1e-5)
    five.save_pretrained(tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    assert again.classnames == five.classnames == [f"class {i}" for i in range(5)]
    torch.testing.assert_close(again(IMAGES), logits)
    other = timm.create_model(DEFAULT, pretrained=True, num_classes=5).eval()
    other.load_state_dict(five.state_dict())
    torch.testing.assert_close(other(IMAGES), logits)
    with pytest.raises(RuntimeError, match=r"fc\.weight"):
        timm.create_model(DEFAULT, pretrained=True).load_state_dict(five.state_dict())
    head = copy.deepcopy(five)  # which keeps its own classes alone
    with pytest.raises(ZooError, match=r"linear layer for class 0, .* Let CLIP read them"):
        head.set_classnames(["class 0", "red fox"])
    head.classes[3] = "red fox"
    head.set_classnames(head.classnames)
    assert "fine-tuned" in head.cannot_reject


def test_unsupported_arguments_are_rejected():
    for arguments, message in (
        ({"img_size": 224}, "img_size=224 is not possible, as CLIP is frozen, which has 192"),
        ({"drop_path_rate": 0.1}, "drop_path_rate=0.1 is not possible"),
        ({"num_prefix_tokens": 1, "act_layer": "gelu"}, "num_prefix_tokens is none of .*act_layer is none of "),
        (
            {"features_only": True, "out_indices": (0, 6)},
            r"Unknown blocks \(0, 6\): feature index 6 is out of range \(0 to 5\)",
        ),
        ({"dtype": "float16"}, "dtype='float16': .* Pass a torch.dtype"),
        ({"output_fmt": "NLC"}, "output_fmt and feature_cls are of feature maps: pass features_only=True"),
        ({"features_only": True, "feature_cls": "hook"}, "feature_cls 'hook'.* getter"),
    ):
        for create in (timm.create_model, dcp_zoo.create_model):
            with pytest.raises(ZooError, match=message):
                create("dcp_mini", **arguments)


def test_the_zoos_create_model_takes_timms_arguments(tmp_path, model):
    args = {"num_classes": 100, "in_chans": 3, "img_size": SIZE, "global_pool": "token", "drop_path_rate": 0.0}
    overlay = {"interpolation": "bilinear"}
    fresh = dcp_zoo.create_model("dcp_mini", device="cpu", dtype=torch.bfloat16, pretrained_cfg_overlay=overlay, **args)
    assert (fresh.prompts["text"].dtype, fresh.pretrained_cfg["interpolation"]) == (torch.bfloat16, "bilinear")
    rates = ("drop_rate", "attn_drop_rate", "proj_drop_rate", "patch_drop_rate", "drop_path_rate", "drop_block_rate")
    zeros = dict.fromkeys(rates, 0.0) | {"img_size": (SIZE, SIZE), "scriptable": False, "exportable": True}
    assert timm.create_model("dcp_mini", **args | zeros).num_classes == 100
    assert {p.device.type for p in timm.create_model("dcp_mini", device="meta").parameters()} == {"meta"}
    half = timm.create_model(DEFAULT, pretrained=True, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {half.stored_stats.dtype} == {torch.float16}
    assert dcp_zoo.create_model(DEFAULT, True, num_classes=5, classifier="none").eval()(IMAGES).shape == (2, 5)
    file = tmp_path / "state.pth"
    torch.save(model.state_dict(), file)
    assert same(dcp_zoo.create_model(DEFAULT, True, checkpoint_path=file).eval(), model)
    torch.save({}, file)
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"no checkpoint")
    for wrong, message in (
        (file, "Missing key"),
        (garbage, "is no file with a state of this model: .*header"),
        (tmp_path, "is no file with a state of this model: FileNotFoundError"),
    ):
        with pytest.raises(ZooError, match=message):
            dcp_zoo.create_model("dcp_mini", checkpoint_path=wrong)


@torch.inference_mode()
def test_forward_intermediates(model):
    """Before the first coupled block no prompt has been rewritten: an open_clip block gives the same
    tokens."""
    visual, n = model.encoder.visual, 1 + 36
    patches = visual.conv1(IMAGES).flatten(2).mT
    x = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + visual.positional_embedding
    x = visual.ln_pre(torch.cat([x, model.prompts["vision"].expand(2, -1, -1)], 1))
    expected = vision_blocks(model)[0](x)[:, :n]
    (found,) = model.forward_intermediates(IMAGES, [0], output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(found, expected[:, 1:])
    n_blocks, calls = len(vision_blocks(model)), []
    hook = vision_blocks(model)[2].ln_1.register_forward_hook(lambda *_: calls.append(1))
    early, (map_1,) = model.forward_intermediates(IMAGES, [1], stop_early=True)
    assert (early.shape, calls) == ((2, 512), [])  # of CLIP's embedding alone, and no further block
    hook.remove()
    features, maps = model.forward_intermediates(IMAGES)
    assert torch.equal(map_1, maps[1])
    torch.testing.assert_close(features, model.forward_features(IMAGES))
    assert [tuple(x.shape) for x in maps] == [(2, 256, 6, 6)] * n_blocks
    for indices, blocks in ((2, [4, 5]), ([-1, 0], [0, 5])):
        found = model.forward_intermediates(IMAGES, indices, intermediates_only=True)
        assert [torch.equal(x, maps[i]) for x, i in zip(found, blocks, strict=True)] == [True] * len(blocks)
    _, tokens = model.forward_intermediates(IMAGES, output_fmt="NLC")
    assert torch.equal(tokens[3].mT.reshape(2, 256, 6, 6), maps[3])
    _, normed = model.forward_intermediates(IMAGES, norm=True, output_fmt="NLC")
    torch.testing.assert_close(normed[2], model.encoder.visual.ln_post(tokens[2]))
    with pytest.raises(ZooError, match=r"Unknown .*choose from NCHW, NLC"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")
    with pytest.raises(TypeError, match="attn_mask"):
        model.forward_intermediates(IMAGES, attn_mask=IMAGES)
    assert model.prune_intermediate_layers([-1, 0]) == [0, 5]


@torch.inference_mode()
def test_features_only(model):
    net = timm.create_model(DEFAULT, pretrained=True, features_only=True, out_indices=(-1, 1)).eval()
    assert (net.feature_info.channels(), net.feature_info.reduction()) == ([256, 256], [32, 32])
    modules = dict(net.model.named_modules())
    assert [modules[name] for name in net.feature_info.module_name()] == [vision_blocks(net.model)[i] for i in (1, 5)]
    expected = model.forward_intermediates(IMAGES, (1, 5), intermediates_only=True)
    assert all(map(torch.equal, net(IMAGES), expected))
    assert resolve_model_data_config(net) == resolve_model_data_config(model)
    assert torch.equal(copy.deepcopy(net)(IMAGES)[0], net(IMAGES)[0])
    tokens = timm.create_model(
        DEFAULT, True, features_only=True, out_indices=(1,), feature_cls="getter", output_fmt="NLC"
    )
    assert torch.equal(tokens.eval()(IMAGES)[0], expected[0].flatten(2).mT)


def test_optimizer_gets_exactly_the_trainable_parameters():
    model = timm.create_model("dcp_mini", pretrained="clip")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    taken = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert taken.keys() == {id(p) for p in trained.values()}
    assert taken[id(trained["prompts.text"])]["weight_decay"] == 0
    assert taken[id(trained["cmpa.0.to_vision.query.weight"])]["weight_decay"] == 0.1
    assert model.no_weight_decay() <= trained.keys()


NAMES = ["ant", "wild_cat", "emu"]
SMALL = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def with_stats(golden) -> DCP:
    return small_model(golden, seed=1, with_statistics=True)


def small_model(golden: dict, seed: int, with_statistics: bool = False) -> DCP:
    clip = build_tiny_clip(golden)
    torch.manual_seed(seed)
    model = loud(DCP(clip, NAMES, n_ctx=3)).eval()
    if with_statistics:
        model.store_stats(SMALL)
    return model


@torch.inference_mode()
def matches_alone(model: DCP, expected: torch.Tensor) -> bool:
    """Whether the logits match `expected` when each image is classified alone."""
    return torch.allclose(torch.cat([model(image) for image in SMALL.split(1)]), expected, atol=1e-4)


@torch.inference_mode()
def logits(model: DCP) -> torch.Tensor:
    return model(SMALL)


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_brings_its_statistics_or_their_absence(golden, with_stats, assign):
    model, expected = small_model(golden, seed=2, with_statistics=not assign), logits(with_stats)
    state = {name: t.clone() for name, t in with_stats.state_dict().items()}
    model.load_state_dict(state, strict=True, assign=assign)
    with pytest.raises(RuntimeError, match="stored_stats"):
        model.load_state_dict(state | {"stored_stats": state["stored_stats"][:1]}, assign=assign)
    assert model.stats == "stored"
    assert matches_alone(model, expected)
    assert (model.stored_stats is state["stored_stats"]) == assign
    other = small_model(golden, seed=2)
    model.load_state_dict(other.state_dict(), strict=True)
    assert (model.stored_stats, model.stats) == (None, "batch")
    assert torch.equal(logits(model), logits(other))


def test_copies_have_the_statistics(with_stats):
    """Those of `torch.save`, and moving averages, which follow the weights."""
    torch.save(with_stats, file := io.BytesIO())
    file.seek(0)
    assert matches_alone(torch.load(file, weights_only=False), logits(with_stats))
    ema, before = ModelEmaV3(with_stats, decay=0.5), with_stats.prompts["text"].detach().clone()
    assert matches_alone(ema.module, logits(with_stats))
    with torch.no_grad():
        with_stats.prompts["text"].mul_(3)
    ema.update(with_stats)
    torch.testing.assert_close(ema.module.prompts["text"], 2 * before)
    torch.testing.assert_close(ema.module.stored_stats, with_stats.stored_stats)


def test_distributed_data_parallel(with_stats):
    """Buffers are broadcast at each forward pass in training, DDP's default."""
    expected = logits(with_stats)
    alone = copy.deepcopy(with_stats).train()
    alone(SMALL).logsumexp(-1).sum().backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(with_stats)
        parallel.train()(SMALL).logsumexp(-1).sum().backward()
        for name, p in alone.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(with_stats.get_parameter(name).grad, p.grad)
        assert matches_alone(parallel.eval(), expected)
    finally:
        dist.destroy_process_group()


TIMM_TESTS = ("forward", "default_cfgs_non_std", "forward_features", "forward_intermediates_features")
TIMM_TESTS += ("forward_intermediates",)  # docs/models.md says why the others cannot pass
FIVE = ("dcp_mini", "dcp_vitb32", "dcp_vitb16", "dcp_eva02_b16", "dcp_mobileclip2_b")


@pytest.mark.scripts  # of real sizes
@pytest.mark.skipif("TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT: a checkout of timm's repository")
@pytest.mark.parametrize("test", TIMM_TESTS)
@pytest.mark.parametrize("name", FIVE)
def test_timms_own_tests(test, name, monkeypatch, request):
    monkeypatch.syspath_prepend(Path(os.environ["TIMM_CHECKOUT"], "tests"))
    for marker in ("base", "cfg", "features", "fxbackward", "fxforward", "timeout", "torchscript"):
        request.config.addinivalue_line("markers", f"{marker}: of timm's tests")
    monkeypatch.setattr("dcp_zoo.zoo.build.dataset_classnames", lambda dataset: NAMES)  # not 1,000
    getattr(importlib.import_module("test_models"), f"test_model_{test}")(name, 1)


@pytest.mark.scripts  # which train
@pytest.mark.skipif("TIMM_CHECKOUT" not in os.environ, reason="TIMM_CHECKOUT: a checkout of timm's repository")
def test_timms_scripts_run_as_the_page_says(tmp_path):
    page = Path(__file__).parents[1] / "docs" / "models.md"
    lines = page.read_text().replace("\\\n", " ").splitlines()
    scripts = [shlex.split(line) for line in lines if line.startswith("python -m dcp_zoo.timm_script")]
    assert [Path(line[3]).name for line in scripts] == ["train.py", "validate.py", "inference.py", "benchmark.py"]
    (tmp_path / "pytorch-image-models").symlink_to(os.environ["TIMM_CHECKOUT"])
    for part, number, name in itertools.product(("train", "validation"), range(4), ("cat", "dog")):
        file = tmp_path / "PHOTOS" / part / name / f"{name}{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((60, 50), 20 + 30 * (name == "dog")).convert("RGB").save(file)
    said = {}
    for _, *arguments in scripts:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said[Path(arguments[2]).name] = done.stdout
    assert json.loads(said["train.py"].partition("--result")[2])[-1]["epoch"] <= 2
    assert json.loads(said["validate.py"].partition("--result")[2])["img_size"] == SIZE
    (table,) = (tmp_path / "answers").glob("*.csv")
    assert len(table.read_text().splitlines()) == 1 + 8
    assert json.loads(said["benchmark.py"].partition("--result")[2])["infer_samples_per_sec"] > 0
    runner = [sys.executable, "-m", "dcp_zoo.timm_script"]
    missing = subprocess.run([*runner, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (missing.returncode, "Pass the path of train.py" in missing.stderr) == (1, True)


IMPORTS = {
    "dcp_zoo, timm": "import dcp_zoo, sys; assert 'timm' not in sys.modules; import timm",
    "timm, dcp_zoo": "import timm; assert not timm.is_model('dcp_mini'); import dcp_zoo",
    "every public name": "from dcp_zoo import *",
    "eager": "import os; os.environ['EAGER_IMPORT'] = '1'; import dcp_zoo",
    "timm in a thread": """
import dcp_zoo, threading
thread = threading.Thread(target=__import__, args=("timm",))
thread.start()
from dcp_zoo import create_model
thread.join()
""",
}


@pytest.mark.scripts  # each imports torch once more
@pytest.mark.parametrize("way", IMPORTS)
def test_the_models_register_once_whatever_is_imported_first(way):
    code = f"{IMPORTS[way]}\nimport timm\nprint(len(timm.list_models('dcp*')))"
    command = [sys.executable, "-W", "error:Overwriting", "-c", code]
    assert subprocess.run(command, capture_output=True, check=True).stdout == b"%d\n" % len(MODELS)


def test_torch_export_names_what_can_be_exported(golden):
    head = PromptHead(FrozenCLIP(build_tiny_clip(golden)), NAMES, texts="a photo of a {}.").eval()
    with pytest.raises(ZooError, match=r"torch.export.export\(model.fuse\(\), ...\) reads images alone"):
        torch.export.export(head, (SMALL,), strict=False)


@pytest.mark.filterwarnings("ignore")  # of torch's tracer
def test_timms_onnx_export(tmp_path, golden):
    """What onnx_export.py calls; the batch size stays free. The new exporter, which takes long, is torch's
    own."""
    pytest.importorskip("onnx", reason="pip install dcp_zoo[export]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install dcp_zoo[export]")
    from timm.utils.onnx import onnx_export

    model = DCP(build_tiny_clip(golden, vision_cfg={"layers": 1}, text_cfg={"layers": 1}), NAMES, n_ctx=2, depth=1)
    model.store_stats(SMALL)
    model.eval()
    onnx_export(model, str(tmp_path / "model.onnx"), input_size=(3, 32, 32), batch_size=2)
    images = torch.randn(4, 3, 32, 32)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input0": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-3)
