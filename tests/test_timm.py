"""timm as the host: its functions, names and scripts on the zoo's models.

Passes with timm 1.0.21 and 1.0.31. `hf-hub:` names are in test_hub.py, which has a Hub to ask.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2

import dcp_zoo
from dcp_zoo import ZooError, timm_run
from dcp_zoo.zoo.registry import MODELS

DEFAULT = "dcp_mini.caltech101-16shot"
HEADS = (next(name for name in dcp_zoo.list_models(pretrained=True) if name != DEFAULT), DEFAULT)  # both bundled
SIZE = MODELS["dcp_mini"].image_size
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> dcp_zoo.DCP:
    return timm.create_model(HEADS[1], pretrained=True).eval()


def same(a: dcp_zoo.DCP, b: dcp_zoo.DCP) -> bool:
    return torch.equal(a.prompts["text"], b.prompts["text"])


def test_names_and_configs():
    assert set(timm.list_models("dcp*")) == set(MODELS)
    assert set(timm.list_models("dcp*", module="dcp")) == set(MODELS)
    assert set(timm.list_pretrained("dcp*")) == set(dcp_zoo.list_pretrained())
    for name in MODELS:
        assert timm.is_model(name)
        assert timm.models.get_pretrained_cfg(name).tag == MODELS[name].default_tag
    cfg = timm.models.get_pretrained_cfg("dcp_vitl14_336.food101-2shot")
    assert (cfg.input_size, cfg.crop_pct, cfg.num_classes) == ((3, 336, 336), 1.0, 101)
    assert cfg.hf_hub_id == "dcp-zoo/dcp_vitl14_336.food101-2shot"


@pytest.mark.parametrize("name", HEADS)
def test_every_way_to_name_a_head_loads_that_head(name):
    expected = dcp_zoo.create_model(name, True)
    tag = name.split(".")[1]
    assert same(timm.create_model(name, pretrained=True), expected)
    assert same(timm.create_model("dcp_mini", pretrained=tag), expected)
    assert same(timm.create_model("dcp_mini", pretrained=True, pretrained_cfg=tag), expected)
    cfg = timm.models.get_pretrained_cfg(name)
    assert same(timm.create_model("dcp_mini", pretrained=True, pretrained_cfg=cfg), expected)
    other = HEADS[1 - HEADS.index(name)]
    assert not same(timm.create_model(other, pretrained=True), expected)
    with pytest.raises(ZooError, match="give only one"):
        timm.create_model(other, pretrained=tag)


def test_default_and_unknown_tags(model):
    assert same(timm.create_model("dcp_mini", pretrained=True), model)
    assert not same(timm.create_model("dcp_mini"), model)
    for call in ({"pretrained": "caltech101-3shot"}, {"pretrained_cfg": "caltech101-3shot", "pretrained": True}):
        with pytest.raises(ZooError, match="has no head 'caltech101-3shot'"):
            timm.create_model("dcp_mini", **call)


def test_local_dir(tmp_path, model):
    model.save_pretrained(tmp_path)
    for again in (
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True),
        timm.create_model("dcp_mini", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path)}),
        timm.create_model(
            "dcp_mini", pretrained=True, pretrained_cfg_overlay={"file": f"{tmp_path}/model.safetensors"}
        ),
    ):
        assert same(again, model)
        assert again.pretrained_cfg["label_names"] == model.classnames
    with pytest.raises(ZooError, match="num_classes=5, and there are 100 class names"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    named = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2, classnames=["cat", "dog"])
    assert named.pretrained_cfg["label_names"] == ["cat", "dog"]
    assert named.eval()(IMAGES).shape == (2, 2)


def test_a_config_cannot_lead_elsewhere(tmp_path, model):
    model.save_pretrained(tmp_path / "head")
    config = json.loads((tmp_path / "head/config.json").read_text())
    for hostile in ({"file": "/etc/passwd"}, {"url": "http://127.0.0.1:9/x"}, {"hf_hub_id": "evil/repo"}):
        changed = config | {"pretrained_cfg": config["pretrained_cfg"] | hostile}
        (tmp_path / "head/config.json").write_text(json.dumps(changed))
        assert same(timm.create_model(f"local-dir:{tmp_path / 'head'}", pretrained=True), model)


def test_data_config_and_transform(model):
    cfg = resolve_model_data_config(model)
    assert cfg["input_size"] == (3, SIZE, SIZE)
    assert (cfg["crop_pct"], cfg["interpolation"], cfg["crop_mode"]) == (1.0, "bicubic", "center")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (250, 290, 3), dtype=np.uint8))
    ours = dcp_zoo.create_transform(model)(image)
    assert torch.equal(create_transform(**cfg, is_training=False)(image), ours)
    changed = timm.create_model("dcp_mini", pretrained_cfg_overlay={"crop_pct": 0.875})
    assert resolve_model_data_config(changed)["crop_pct"] == 0.875


@torch.inference_mode()
def test_features_and_head_make_the_forward_pass(model):
    features = model.forward_features(IMAGES)
    assert features.shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features, pre_logits=True), features)
    logits = model(IMAGES)
    torch.testing.assert_close(model.forward_head(features), logits)
    torch.testing.assert_close(model.get_classifier()(features), logits)


def test_the_head_needs_constant_text_features():
    fresh = timm.create_model("dcp_mini", pretrained="clip").eval()  # bidirectional, not calibrated
    assert fresh(IMAGES).shape == (2, 100)
    with pytest.raises(ZooError, match="depend on the images"):
        fresh.forward_head(fresh.forward_features(IMAGES))


@torch.inference_mode()
def test_reset_classifier():
    model = timm.create_model("dcp_mini", pretrained=True).eval()
    model.reset_classifier(100)  # the classes that it has
    with pytest.raises(ZooError, match="num_classes=3, and there are 100 class names"):
        model.reset_classifier(3)
    model.reset_classifier(3, classnames=["cat", "dog", "red fox"])
    assert model(IMAGES).shape == (2, 3)
    model.reset_classifier(0)
    assert torch.equal(model(IMAGES), model.forward_features(IMAGES))
    assert isinstance(model.get_classifier(), torch.nn.Identity)
    headless = timm.create_model("dcp_mini", pretrained=True, num_classes=0).eval()
    assert torch.equal(headless(IMAGES), model(IMAGES))


@pytest.mark.parametrize(
    "value", [{"in_chans": 1}, {"img_size": 224}, {"global_pool": "avg"}, {"drop_rate": 0.1}, {"num_classes": 10}]
)
def test_what_cannot_be_honoured_is_refused(value):
    with pytest.raises(ZooError, match=next(iter(value))):
        timm.create_model("dcp_mini", **value)


def test_what_scripts_pass_is_accepted():
    args = {"num_classes": 100, "in_chans": 3, "img_size": SIZE, "global_pool": "token", "drop_rate": 0.0}
    assert timm.create_model("dcp_mini", scriptable=False, exportable=True, **args).num_classes == 100
    assert timm.create_model("dcp_mini", img_size=(SIZE, SIZE), num_classes=None).num_classes == 100


@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_optimizer_takes_exactly_what_trains(layer_decay):
    model = timm.create_model("dcp_mini", pretrained="clip")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
    taken = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert taken.keys() == {id(p) for p in trained.values()}
    assert taken[id(trained["prompts.text"])]["weight_decay"] == 0
    assert taken[id(trained["cmpa.0.to_vision.query.weight"])]["weight_decay"] == 0.1
    assert model.no_weight_decay() <= trained.keys()
    if layer_decay:
        groups = [taken[id(trained[name])] for name in ("prompts.text", "cmpa.0.to_vision.query.weight")]
        assert groups[0]["lr_scale"] < groups[1]["lr_scale"] == 1


def test_grad_checkpointing_gives_the_same_gradients():
    torch.manual_seed(0)
    model = timm.create_model("dcp_mini", classnames=["cat", "dog"]).train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(IMAGES).logsumexp(-1).sum().backward()
        gradients.append(model.prompts["vision"].grad.clone())
    torch.testing.assert_close(*gradients)


SCRIPT = """
import sys, timm, torch, helper
model = timm.create_model(sys.argv[1], pretrained=True).eval()
size = timm.data.resolve_model_data_config(model)["input_size"]
with torch.inference_mode():
    print(__name__, helper.HERE, sys.argv[1:], tuple(model(torch.zeros(1, *size)).shape))
"""


def python(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, check=False)


def test_timm_run(tmp_path):
    """A script that knows only timm, with a module of its own beside it, as timm's repository scripts are."""
    (tmp_path / "helper.py").write_text("HERE = True")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = python("-m", "dcp_zoo.timm_run", script, DEFAULT, "--flag")
    assert done.stdout == f"__main__ True ['{DEFAULT}', '--flag'] (1, 100)\n", done.stderr


@pytest.mark.parametrize("argv", [["timm_run"], ["timm_run", "none.py"]])
def test_timm_run_needs_a_script(monkeypatch, argv):
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit, match=r"Usage: python -m dcp_zoo.timm_run SCRIPT"):
        timm_run.main()


def test_device_modules():
    """`train.py --device-modules dcp_zoo` imports the module after timm, and the names are there."""
    code = "import timm, importlib; assert not timm.is_model('dcp_mini'); importlib.import_module('dcp_zoo'); "
    done = python("-c", code + "print(timm.create_model('dcp_mini', num_classes=100).num_classes)")
    assert done.stdout == "100\n", done.stderr


@pytest.mark.filterwarnings("ignore")  # of torch's tracer
@pytest.mark.parametrize("use_dynamo", [False, True])
def test_timms_onnx_export(tmp_path, use_dynamo):
    """What onnx_export.py calls; the batch size stays free."""
    pytest.importorskip("onnx", reason="pip install dcp_zoo[export]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install dcp_zoo[export]")
    from timm.utils.onnx import onnx_export

    if use_dynamo and timm.__version__ == "1.0.21":
        pytest.skip("timm 1.0.21 asks torch for an exporter that it no longer has")
    model = timm.create_model(DEFAULT, pretrained=True, exportable=True)
    onnx_export(model, str(tmp_path / "model.onnx"), batch_size=2, use_dynamo=use_dynamo)
    images = torch.cat([IMAGES, IMAGES.flip(-1)])
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"input0": images.numpy()})
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-3)
