"""Exported files against the model, and what reads them without torch."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from helpers import answers, classify
from PIL import Image

onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the export extra is not installed")

from dcp_zoo import ZooError, create_transform, predict  # noqa: E402
from dcp_zoo.answers import Promises, log_softmax  # noqa: E402
from dcp_zoo.data import load_image  # noqa: E402
from dcp_zoo.data.find import find_images  # noqa: E402
from dcp_zoo.data.images import crop, normalise  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.heads.config import read_config  # noqa: E402
from dcp_zoo.prediction.heads import HeadBackend  # noqa: E402
from dcp_zoo.prediction.onnx import CUDA, OnnxClassifier, providers  # noqa: E402
from dcp_zoo.release import export_hub  # noqa: E402
from dcp_zoo.release import onnx as export_module  # noqa: E402
from dcp_zoo.release.onnx import export  # noqa: E402
from dcp_zoo.serve.app import application  # noqa: E402

pytestmark = pytest.mark.usefixtures("exported_once")
PAGE = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
SIZES = [(300, 201), (97, 240), (131, 130), (32, 32), (20, 33), (1500, 1001)]
CPU = ["CPUExecutionProvider"]
BUNDLED = "dcp_mini.caltech101-1shot"
WITHOUT_TORCH = """import sys
sys.modules.update(dict.fromkeys(("torch", "torchvision", "timm", "open_clip", "sklearn")))
from dcp_zoo.cli import main
main()"""


@torch.no_grad()
def test_answers_and_features_are_the_models(tiny_head, onnx_file, tmp_path):
    """`predict` writes all its files with them, in a process that cannot import torch."""
    cfg = tiny_head.pretrained_cfg
    pixels = np.random.default_rng(0).integers(0, 256, (2, *cfg["input_size"]), np.uint8)
    images = torch.from_numpy(normalise(pixels, cfg))
    found = OnnxClassifier(onnx_file, features=True).compute(pixels)
    np.testing.assert_allclose(found.features, tiny_head.encode_image(images), atol=1e-4)
    np.testing.assert_allclose(found.logits, tiny_head(images), atol=1e-3)
    ((expected, others),) = classify(find_images(sample_images()), HeadBackend(tiny_head, features=True))
    files = {name: tmp_path / name for name in ("a.jsonl", "f.npz", "s.html")}
    outputs = zip(("--output", "--features", "--sheet"), files.values(), strict=True)
    command = [sys.executable, "-c", WITHOUT_TORCH, "predict", "--sample", "--head", onnx_file]
    subprocess.run([*command, *(word for pair in outputs for word in pair)], check=True)
    rows = [json.loads(line) for line in files["a.jsonl"].read_text().splitlines()]
    np.testing.assert_allclose(np.load(files["f.npz"])["features"], others.features, atol=1e-4)
    for row, other in zip(rows, expected, strict=True):
        assert row["predictions"][0]["class"] == other["predictions"][0]["class"]
        assert row["predictions"][0]["probability"] == pytest.approx(other["predictions"][0]["probability"], abs=1e-3)


def test_the_documented_client(onnx_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, "model.onnx")
    Image.effect_noise((300, 201), 90).convert("RGB").save("photo.jpg")
    client: dict = {}
    exec(PAGE.partition("```python\n")[2].partition("```")[0], client)
    expected = answers(OnnxClassifier(onnx_file), "photo.jpg")
    assert client["classify"]("photo.jpg") == pytest.approx({p["class"]: p["probability"] for p in expected}, abs=1e-5)


def test_other_files_and_options_are_refused(onnx_file, tmp_path, run):
    (tmp_path / "bad.onnx").write_bytes(b"hello")
    assert "bad.onnx is not an exported model" in run.refused("predict", "--sample", "--head", tmp_path / "bad.onnx")
    for command in (("predict", "--sample"), ("serve",)):
        run.refused(*command, "--head", onnx_file, "--classes", "a,b")
    args = "--head", BUNDLED, "--format", "onnyx", "--output", tmp_path / "new"
    assert "choose from onnx, hub" in run.refused("export", *args)
    with pytest.raises(ZooError, match="'dcp_mimi' is neither"):  # a head is loaded by its name
        export("dcp_mimi", tmp_path / "new.onnx")


def test_onnx_runtime_computes_where_it_is_asked_to(onnx_file, monkeypatch):
    """With a provider for GPUs and without one; and with one that cannot start, which leaves the CPU's
    answers."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: CPU)
    assert providers("auto") == providers("cpu") == CPU
    with pytest.warns(UserWarning, match="computes on the CPU, not on cuda:1: install"):
        assert providers("cuda:1") == CPU
    with pytest.raises(ZooError, match="auto, cpu, cuda"):
        providers("mps")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, *CPU])
    assert providers("cuda:1") == [(CUDA, {"device_id": "1"}), *CPU]
    assert providers("cpu") == CPU
    with pytest.warns(UserWarning, match="computes on the CPU, not on auto"):
        classifier = OnnxClassifier(onnx_file, device="auto")
    images = np.zeros((3, 3, 32, 32), np.float32)
    np.testing.assert_allclose(classifier(images), OnnxClassifier(onnx_file)(images), rtol=1e-5)


@pytest.mark.parametrize("tolerance", ["LOGIT_TOLERANCE", "TOLERANCE"])
def test_a_file_that_disagrees_is_not_kept(tiny_head, tmp_path, monkeypatch, tolerance):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(export_module, tolerance, 1e-9)
    with pytest.raises(ZooError, match="does not match the model"):
        export(tiny_head, path) if tolerance == "LOGIT_TOLERANCE" else export_hub(tiny_head, tmp_path / "repo")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@torch.no_grad()
def test_a_file_rejects_the_images_that_the_model_rejects(tiny_head, onnx_file, run):
    """And so do the command line and the server with them."""
    images = torch.stack([create_transform(tiny_head)(load_image(path)) for path in sample_images()])
    expected = [name is None for name in tiny_head.predict(images, True)]
    assert set(expected) == {False, True}
    said = json.loads(run.ok("predict", "--sample", "--head", onnx_file, "--reject", "--json"))
    assert [row["rejected"] for row in said] == expected
    with TestClient(application(onnx_file)) as client:
        form = [("images", Path(path).read_bytes()) for path in sample_images()]
        served = client.post("/predict", files=form).json()
        expected_rows = promised_by(tiny_head)
        answers = client.post("/predict?sets=0.9", files=form).json()["images"]
        for asked, message in (("0.8", "Sets for 80 % need 4 images"), ("0.7", "from 0.8, 0.9, 0.95"), ("x", "number")):
            refused = client.post(f"/predict?sets={asked}", files=form)
            assert (refused.status_code, message in refused.json()["detail"]) == (422, True)
    assert [image["rejected"] for image in served["images"]] == expected
    said = json.loads(run.ok("predict", "--sample", "--head", onnx_file, "--reject", "--sets", "0.9", "--json"))
    for found in (answers, said):
        assert [(row["trusted"], row["set"]) for row in found] == expected_rows
    assert [row[0].trusted for row in predict(tiny_head, sample_images())] == [trusted for trusted, _ in expected_rows]
    assert {is_trusted for is_trusted, _ in expected_rows} == {False, True}
    assert [not names for _, names in expected_rows] == expected  # what is unlike the classes has no set
    assert {is_trusted for (is_trusted, _), is_out in zip(expected_rows, expected, strict=True) if is_out} == {False}
    assert "Unknown coverage" in run.refused("predict", "--sample", "--head", onnx_file, "--sets", "0.5")


def promised_by(head):
    """Whether each of the package's photographs is trusted, and its set, by PyTorch, without --reject."""
    promises = Promises.of(head.promises, 0.9)
    rows = HeadBackend(head).outputs(sample_images(), 6)[1].rows(head.classnames, 1, promises)
    return [(row["trusted"], row["set"]) for row in rows]


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_resize_in_the_graph_is_pils(crop_pct):
    """On noise, the worst case: at most one grey level, in at most 2 of 1,000 values."""
    cfg = {"input_size": [3, 32, 32], "crop_pct": crop_pct, "mean": [0.0] * 3, "std": [1 / 255] * 3}
    graph = onnx.parser.parse_model(export_module.preprocessing_graph(cfg, ir=10, opset=20))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=CPU)
    rng, differ, values = np.random.default_rng(0), 0, 0
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        found = session.run(None, {"pixel_values": np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255})[0][0]
        difference = np.abs(found - crop(image, cfg))
        assert difference.max() < 1.01
        differ, values = differ + (difference > 0.5).sum(), values + difference.size
    assert differ <= 0.002 * values


def test_a_repo_for_other_clients(run, tiny_head, onnx_file, tmp_path, monkeypatch):
    """They scale pixels to [0, 1], and the file does all else; transformers alone must not find weights."""
    monkeypatch.setattr("dcp_zoo.create_model", lambda *args, **options: tiny_head)
    folder = tmp_path / "repo"
    run.ok("export", "--head", BUNDLED, "--format", "hub", "--output", folder)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "onnx/model.onnx"}
    config = json.loads((folder / "config.json").read_text())
    names = config["id2label"]
    assert [names[str(config["label2id"][name])] for name in tiny_head.classnames] == tiny_head.classnames
    assert config["model_type"] == "vit"
    assert not (folder / config["transformers_weights"]).exists()
    assert read_config(folder)["label_names"] == tiny_head.classnames  # it is a checkpoint all the same
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    steps = [processor[f"do_{step}"] for step in ("resize", "center_crop", "normalize", "rescale")]
    assert steps == [False, False, False, True]
    assert (processor["size"], processor["image_mean"]) == ({"shortest_edge": 32}, [0.5] * 3)
    assert "ORTModelForImageClassification" in (folder / "README.md").read_text()
    session, plain = onnxruntime.InferenceSession(folder / "onnx/model.onnx", providers=CPU), OnnxClassifier(onnx_file)
    for i, size in enumerate(SIZES):
        image = load_image(sample_images()[i % 2]).resize(size)
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] * np.float32(processor["rescale_factor"])
        expected = np.exp(log_softmax(plain(plain.preprocess(image)[None])))
        assert expected.max() < 0.99  # not saturated
        (logits,) = session.run(None, {"pixel_values": pixels})
        np.testing.assert_allclose(np.exp(log_softmax(logits)), expected, atol=1e-3)


@pytest.mark.scripts
def test_the_page_makes_an_int8_file(onnx_file, tmp_path, monkeypatch, capsys):
    """docs/deploy.md by ONNX Runtime; predict takes the file."""
    (code,) = (block for block in re.findall("```python\n(.*?)```", PAGE, re.DOTALL) if "quantize_static" in block)
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, "my_head.onnx")
    Path("MY_PHOTOS").mkdir()
    for photo in sample_images():
        shutil.copy(photo, "MY_PHOTOS")
    exec(code, {"__name__": "__main__"})
    assert "of 6 answers are the same" in capsys.readouterr().out
    assert Path("int8.onnx").stat().st_size < 0.6 * Path("my_head.onnx").stat().st_size
    rows = classify(find_images(["MY_PHOTOS"]), OnnxClassifier(Path("int8.onnx"), 1))
    assert sum(len(batch) for batch, _ in rows) == 6
