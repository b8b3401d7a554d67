"""Variants of exported ONNX files: preprocessing inside, float16; and the options that make them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import answers, classify
from PIL import Image

for module in ("onnxruntime", "onnxscript"):
    pytest.importorskip(module, reason="the export extra is not installed")

from dcp_zoo import ZooError  # noqa: E402
from dcp_zoo.answers import log_softmax  # noqa: E402
from dcp_zoo.data import load_image  # noqa: E402
from dcp_zoo.data.find import find_images  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.data.pixels import crop  # noqa: E402
from dcp_zoo.heads.config import read_config  # noqa: E402
from dcp_zoo.onnx import export as export_module  # noqa: E402
from dcp_zoo.onnx.classifier import OnnxClassifier  # noqa: E402
from dcp_zoo.onnx.export import export  # noqa: E402

SIZES = [(300, 201), (97, 240), (131, 130), (32, 32), (20, 33), (1500, 1001)]


pytestmark = pytest.mark.usefixtures("exported_once")


@pytest.fixture(scope="module")
def plain(onnx_file):
    return OnnxClassifier(onnx_file)


@pytest.fixture(scope="module")
def inside(exported_once, tiny_head, tmp_path_factory):
    file = tmp_path_factory.mktemp("inside") / "model.onnx"
    return OnnxClassifier(export(tiny_head, file, preprocessing="inside", precision="float16"))


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_resize_in_the_graph_is_pils(crop_pct):
    """On noise, the worst case: at most one grey level, in at most 2 of 1,000 values."""
    import onnx
    import onnxruntime

    cfg = {"input_size": [3, 32, 32], "crop_pct": crop_pct, "mean": [0.0] * 3, "std": [1 / 255] * 3}
    graph = onnx.parser.parse_model(export_module.preprocessing_graph(cfg, ir=10, opset=20))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    rng, differ, values = np.random.default_rng(0), 0, 0
    for width, height in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        found = session.run(None, {"pixels": np.asarray(image)[None]})[0][0]
        difference = np.abs(found - crop(image, cfg))
        assert difference.max() < 1.01
        differ, values = differ + (difference > 0.5).sum(), values + difference.size
    assert differ <= 0.002 * values


def test_many_images_through_either_file(plain, inside):
    images = find_images(sample_images())
    (logits,), (pixels,) = (classify(images, OnnxClassifier(file.path)) for file in (plain, inside))
    for one, other in zip(logits.rows, pixels.rows, strict=True):
        assert {p["class"]: p["probability"] for p in other["predictions"]} == pytest.approx(
            {p["class"]: p["probability"] for p in one["predictions"]}, abs=3e-3
        )
    with pytest.raises(ZooError, match="has no image features: export it with the preprocessing outside"):
        OnnxClassifier(inside.path, features=True)


def test_pixels_in_probabilities_out(plain, inside):
    """Photographs of all sizes alone, and as a batch of what Python resized."""
    photographs = [load_image(sample_images()[i % 2]).resize(size) for i, size in enumerate(SIZES)]
    expected = np.concatenate([plain.probabilities(plain.preprocess(image)[None]) for image in photographs])
    alone = np.concatenate([inside(np.asarray(image)[None]) for image in photographs])
    np.testing.assert_allclose(alone, expected, atol=1e-3)
    batch = inside.probabilities(np.stack([inside.preprocess(image) for image in photographs]))
    np.testing.assert_allclose(batch, expected, atol=1e-3)
    assert expected.max(1).min() < 0.99  # not saturated
    assert answers(inside, photographs[0])[0]["class"] == answers(plain, photographs[0])[0]["class"]


def test_float16_halves_the_file(plain, inside):
    before, after = (model.path.stat().st_size for model in (plain, inside))
    assert after < 0.6 * before
    assert inside.info["precision"] == "float16"


def test_the_command_line_takes_such_a_file(run, inside, plain):
    command = ("predict", sample_images()[0], "--head", inside.path, "--json")
    expected = answers(plain, sample_images()[0], 1)
    assert json.loads(run.ok(*command, "--top-k", 1))[0]["predictions"][0]["class"] == expected[0]["class"]
    assert "preprocessing outside, or omit --features, --together" in run.refused(*command, "--together")


def test_a_repo_for_other_clients(run, tiny_head, plain, tmp_path, monkeypatch):
    """They scale pixels to [0, 1], and the file does all else; transformers alone must not find weights."""
    import onnxruntime

    monkeypatch.setattr("dcp_zoo.zoo.factory.create_model", lambda *args, **options: tiny_head)
    folder = tmp_path / "repo"
    shown = run.ok(
        "export", "--head", "dcp_mini.caltech101-1shot", "--format", "hub", "--precision", "float16", "--output", folder
    )
    assert "README.mdshowshowtouseit" in "".join(shown.split())  # a long path is wrapped
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    onnx_files = {"onnx/model.onnx", "onnx/model_fp16.onnx"}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *onnx_files}
    config = json.loads((folder / "config.json").read_text())
    names = config["id2label"]
    assert [names[str(config["label2id"][name])] for name in tiny_head.classnames] == tiny_head.classnames
    assert config["model_type"] == "vit"
    assert not (folder / config["transformers_weights"]).exists()
    assert read_config(folder)["label_names"] == tiny_head.classnames  # it is a checkpoint all the same
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    assert [processor[f"do_{step}"] for step in ("resize", "center_crop", "normalize", "rescale")] == [False] * 3 + [
        True
    ]
    assert (processor["size"], processor["image_mean"]) == ({"shortest_edge": 32}, [0.5] * 3)
    assert "ORTModelForImageClassification" in (folder / "README.md").read_text()

    image = load_image(sample_images()[0]).resize(SIZES[0])
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] * np.float32(processor["rescale_factor"])
    for file, tolerance in (("onnx/model.onnx", 1e-5), ("onnx/model_fp16.onnx", 5e-3)):
        session = onnxruntime.InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"pixel_values": pixels})
        expected = plain.probabilities(plain.preprocess(image)[None])
        np.testing.assert_allclose(np.exp(log_softmax(logits)), expected, atol=tolerance)


@pytest.mark.scripts
def test_the_page_makes_an_int8_file(onnx_file, tmp_path, monkeypatch, capsys):
    """docs/deploy.md by ONNX Runtime; predict takes the file."""
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text()
    (code,) = (block for block in re.findall("```python\n(.*?)```", page, re.DOTALL) if "quantize_static" in block)
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file, "my_head.onnx")
    Path("MY_PHOTOS").mkdir()
    for path in sample_images():
        shutil.copy(path, "MY_PHOTOS")
    exec(code, {"__name__": "__main__"})
    assert "of 6 answers are the same" in capsys.readouterr().out
    assert Path("int8.onnx").stat().st_size < 0.6 * Path("my_head.onnx").stat().st_size
    rows = classify(find_images(["MY_PHOTOS"]), OnnxClassifier(Path("int8.onnx"), 1))
    assert sum(len(batch.rows) for batch in rows) == 6


def test_a_variant_that_disagrees_is_not_kept(tiny_head, tmp_path, monkeypatch):
    monkeypatch.setitem(export_module.TOLERANCES, "float16", 0.0)
    with pytest.raises(ZooError, match="differ from the model's by"):
        export(tiny_head, tmp_path / "model.onnx", precision="float16")
    assert list(tmp_path.iterdir()) == []


def test_options(run, tmp_path, tiny_head):
    with pytest.raises(ZooError, match="float32, float16"):
        export(tiny_head, tmp_path / "x.onnx", precision="int4")
    head = "dcp_mini.caltech101-16shot"
    for args, message in {
        ("--format", "hub", "--preprocessing", "outside"): "omit --preprocessing",
        ("--precision", "int8"): "choose from float32, float16.",
    }.items():
        assert message in run.refused("export", "--head", head, *args, "--output", tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
