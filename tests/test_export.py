"""Exported files against the model, their metadata, and the command line without torch's model."""

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers import answers, classify
from PIL import Image

from dcp_zoo import DCP, ZooError, create_model, create_transform
from dcp_zoo.backbone import MINI_CFG
from dcp_zoo.backbone.mini import STEM_STAGES, build_mini_clip
from dcp_zoo.cli import deploy
from dcp_zoo.data import load_image
from dcp_zoo.data.find import find_images
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.onnx import export as export_module
from dcp_zoo.onnx.classifier import CUDA, OnnxClassifier, providers
from dcp_zoo.onnx.export import export
from dcp_zoo.prediction.heads import HeadPredictor
from dcp_zoo.serve.app import application
from dcp_zoo.zoo.registry import WEIGHTS

NAMES = ["ant", "wild_cat", "crocodile head", "emu"]


@pytest.fixture(scope="module")
def short() -> DCP:
    """The miniature with one block of each kind in the stem and three in the towers, as torch's exporter takes seconds
    for the others; its frozen weights are random."""
    layers = {part: MINI_CFG[part] | {"layers": 3} for part in ("vision_cfg", "text_cfg")}
    clip = build_mini_clip(None, MINI_CFG | layers)
    stem = clip.visual.conv1.stem
    firsts = [sum(stage[0] for stage in STEM_STAGES[:i]) for i in range(len(STEM_STAGES))]
    stem.blocks = torch.nn.Sequential(*(stem.blocks[i] for i in sorted([*firsts, firsts[-2] + 1])))
    short = DCP(clip, NAMES, depth=2)
    short.pretrained_cfg = create_model("dcp_mini", "clip", classnames=NAMES).pretrained_cfg
    return calibrated(short)


def calibrated(model: DCP) -> DCP:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.prompts.values():
            p.add_(0.2 * torch.randn_like(p))
    model.store_stats(torch.randn(4, *model.pretrained_cfg["input_size"]))
    return model.eval()


@pytest.fixture(scope="module")
def onnx_file(short, tmp_path_factory):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    pytest.importorskip("onnxscript", reason="the export extra is not installed")
    return export(short, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_the_documented_client(onnx_file, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, "model.onnx")
    Image.effect_noise((300, 201), 90).convert("RGB").save("photo.jpg")
    client: dict = {}
    exec(page.partition("```python\n")[2].partition("```")[0], client)
    expected = answers(OnnxClassifier(onnx_file), "photo.jpg")
    assert client["classify"]("photo.jpg") == pytest.approx({p["class"]: p["probability"] for p in expected}, abs=1e-5)


def test_onnx_command_line_needs_no_torch_model(short, onnx_file, monkeypatch, run):
    path = sample_images()[0]
    with torch.no_grad():
        expected = short(create_transform(short)(load_image(path))[None]).softmax(-1)[0]
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # any torch module would fail now
    (answer,) = json.loads(run.ok("predict", path, "--head", onnx_file, "--json", "--top-k", 2))
    assert [p["class"] for p in answer["predictions"]] == [NAMES[i] for i in expected.topk(2).indices]
    assert answer["predictions"][0]["probability"] == pytest.approx(expected.max().item(), abs=1e-3)


def test_onnx_rejects_other_files_and_options(onnx_file, tmp_path, run):
    for content in (b"", b"hello"):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ZooError, match=r"bad.onnx is not an exported model .*dcp-zoo export"):
            OnnxClassifier(tmp_path / "bad.onnx")
    for command in (("predict", "--sample"), ("serve",)):
        run.refused(*command, "--head", onnx_file, "--classes", "a,b")


@torch.no_grad()
def test_onnx_runtime_computes_where_it_is_asked_to(onnx_file, monkeypatch):
    """With a provider for GPUs and without one; and with one that cannot start, which leaves the CPU's answers."""
    import onnxruntime

    cpu = ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: cpu)
    assert providers("auto") == providers("cpu") == cpu
    with pytest.warns(UserWarning, match="computes on the CPU, not on cuda:1: install"):
        assert providers("cuda:1") == cpu
    with pytest.raises(ZooError, match="auto, cpu, cuda"):
        providers("mps")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, *cpu])
    assert providers("auto") == [(CUDA, {"device_id": "0"}), *cpu]
    assert providers("cuda:1") == [(CUDA, {"device_id": "1"}), *cpu]
    assert providers("cpu") == cpu
    with pytest.warns(UserWarning, match="computes on the CPU, not on auto"):
        classifier = OnnxClassifier(onnx_file, device="auto")
    for batch in (1, 3):
        images = np.zeros((batch, 3, 192, 192), np.float32)
        np.testing.assert_allclose(classifier(images), OnnxClassifier(onnx_file)(images), rtol=1e-5)


def test_a_file_that_disagrees_is_not_kept(short, onnx_file, tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(export_module, "write_onnx", lambda fused, path, images: shutil.copy(onnx_file, path))
    monkeypatch.setattr(export_module, "LOGIT_TOLERANCE", 1e-9)
    with pytest.raises(ZooError, match="does not match the model"):
        export(short, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@torch.no_grad()
def test_a_file_with_preprocessing_inside_rejects_the_images_that_the_model_rejects(
    rejecting_once, onnx_file, tmp_path, run
):
    """And so do the command line and the server with it."""
    found = find_images(sample_images())
    head, expected = rejecting_once
    assert set(expected) == {False, True}
    file = export(head, tmp_path / "inside.onnx", preprocessing="inside")
    (answers,) = classify(found, OnnxClassifier(file, reject=True))
    assert [row["rejected"] for row in answers.rows] == expected
    said = json.loads(run.ok("predict", "--sample", "--head", file, "--reject", "--json"))
    assert [row["rejected"] for row in said] == expected
    with TestClient(application(file)) as client:
        served = client.post("/predict", files=[("images", Path(image.path).read_bytes()) for image in found]).json()
    assert [image["rejected"] for image in served["images"]] == expected
    problem = "model.onnx has no threshold to reject images. Export a head that can"
    assert problem in run.refused("predict", "--sample", "--head", onnx_file, "--reject")


# -------------------------------------------------------------------------------------------------- heads in the cache

BUNDLED = "dcp_mini.caltech101-1shot"


@pytest.fixture
def exports(onnx_file, tmp_path, monkeypatch) -> list[Path]:
    """An empty cache, and the files that are exported into it: copies of `onnx_file`."""
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dcp_zoo.zoo.factory.create_model", lambda *args, **options: SimpleNamespace(eval=lambda: None))
    made: list[Path] = []

    def export(model, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(shutil.copy(onnx_file, path))

    monkeypatch.setattr(export_module, "export", export)
    return made


def test_the_cache_follows_what_it_depends_on(exports, tmp_path, monkeypatch):
    head = shutil.copytree(WEIGHTS / BUNDLED, tmp_path / "head")
    names = [(BUNDLED, None), (BUNDLED, ["a"]), (BUNDLED, ["a", "b"]), (f"local-dir:{head}", None)]
    files = [deploy.onnx_file(*name) for name in names + names]
    assert files[:4] == files[4:] == exports
    assert len(set(files)) == 4
    assert files[3].stem == files[0].stem.replace(BUNDLED, "head")  # the same head under another name
    config = json.loads((head / "config.json").read_text())
    (head / "config.json").write_text(json.dumps(config | {"label_names": ["x", *config["label_names"][1:]]}))
    deploy.onnx_file(f"local-dir:{head}")
    monkeypatch.setattr(deploy, "FOLDER", "onnx-9")  # of another version
    deploy.onnx_file(BUNDLED)
    with ThreadPoolExecutor(2) as pool:  # started together, one waits for the other
        assert len({*pool.map(lambda _: deploy.onnx_file(BUNDLED, ["c"]), range(2))}) == 1
    assert len(set(exports)) == len(exports) == 7


def test_a_cached_head_classifies_without_torch(exports):
    deploy.onnx_file(BUNDLED)
    program = "import sys; from dcp_zoo.cli import main; from contextlib import suppress\n"
    program += f"from dcp_zoo.cli.deploy import onnx_file; sys.argv += ['--head', str(onnx_file('{BUNDLED}'))]\n"
    program += "with suppress(SystemExit): main()\n"
    program += (
        "print(*({'torch', 'torchvision', 'timm', 'open_clip', 'sklearn'} & sys.modules.keys()), file=sys.stderr)"
    )
    args = ["predict", "--sample", "--json", "--top-k", "1"]
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ""
    assert [answer["predictions"][0]["class"] in NAMES for answer in json.loads(done.stdout)] == [True] * 6


@torch.no_grad()
def test_onnx_features_are_the_models(short, onnx_file, run, tmp_path):
    """And so are the answers; `predict` writes all its files with them."""
    images = torch.randn(2, *short.pretrained_cfg["input_size"])
    found = OnnxClassifier(onnx_file, features=True).classify(images.numpy())
    np.testing.assert_allclose(found.features, short.encode_image(images), atol=1e-4)
    np.testing.assert_allclose(found.logits, short(images), atol=1e-3)
    files = {name: tmp_path / name for name in ("a.jsonl", "f.npz", "s.html")}
    outputs = zip(("--output", "--features", "--sheet"), files.values(), strict=True)
    run.ok("predict", "--sample", "--head", onnx_file, *(word for pair in outputs for word in pair))
    rows = [json.loads(line) for line in files["a.jsonl"].read_text().splitlines()]
    ((expected, others),) = classify(find_images(sample_images()), HeadPredictor(short, features=True))
    np.testing.assert_allclose(np.load(files["f.npz"])["features"], others, atol=1e-4)
    for row, other in zip(rows, expected, strict=True):
        assert row["predictions"][0]["class"] == other["predictions"][0]["class"]
        assert row["predictions"][0]["probability"] == pytest.approx(other["predictions"][0]["probability"], abs=1e-3)
