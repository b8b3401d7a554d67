"""`Predictor`, which engines for many machines carry to their processes, and decoding as a step of its
own."""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dcp_zoo
from dcp_zoo import Predictor, ZooError
from dcp_zoo.data import load_image
from dcp_zoo.data.images import normalise
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.features.photos import pixels_of

BUNDLED = "dcp_mini.caltech101-1shot"


def test_decoding_is_a_step_for_other_processes_and_gives_the_decode_the_transform():
    """Of a path, its bytes or an image: nothing of the model goes with them."""
    cfg, path = dcp_zoo.get_pretrained_cfg("dcp_mini"), sample_images()[0]
    work = partial(pixels_of, preprocessing={name: cfg[name] for name in ("input_size", "crop_pct", "interpolation")})
    expected = dcp_zoo.create_transform("dcp_mini")(load_image(path)).numpy()
    for image in (path, Path(path).read_bytes(), load_image(path)):
        pixels = pickle.loads(pickle.dumps(work))(image)
        assert pixels.dtype == np.uint8
        np.testing.assert_allclose(normalise(pixels, cfg), expected, atol=1e-6)


def test_a_predictor_takes_what_an_engine_has_and_never_raises_for_an_image():
    """In any form, with the same columns of the same types in every batch; also of what another process
    decoded."""
    predictor, paths = Predictor(BUNDLED, top_k=2, features=True), sample_images()[:3]
    assert len(pickle.dumps(predictor)) < 1000
    expected = dcp_zoo.predict(BUNDLED, paths, top_k=2)
    files = [paths[0], Path(paths[1]).read_bytes(), {"bytes": None, "path": paths[2]}, np.asarray(load_image(paths[0]))]
    batch = {"id": np.arange(9), "image": [*files, None, float("nan"), b"x", object(), "missing.jpg"]}
    found = pickle.loads(pickle.dumps(predictor))(batch)
    assert [*found] == ["id", *"class probability class_2 probability_2 rejected error features".split()]
    assert (found["id"] == batch["id"]).all()
    for i, row in enumerate([*expected, expected[0]]):
        assert [found["class"][i], found["class_2"][i]] == [answer.name for answer in row]
        assert [found["probability"][i], found["probability_2"][i]] == pytest.approx(
            [answer.probability for answer in row], abs=1e-5
        )
    assert (found["error"] != "").tolist() == [False] * 4 + [True] * 5
    assert {*found["class"][4:], *found["class_2"][4:]} == {""}
    assert np.isnan(found["probability"][4:]).all()
    assert np.isnan(found["features"][4:]).all()
    decoded = pickle.loads(pickle.dumps(predictor.decode))(batch)
    assert (decoded["image"].shape, decoded["image"].dtype) == ((9, 3, 192, 192), np.uint8)
    again, none = predictor(decoded), predictor({"id": [], "image": []})
    for name in [*found][1:]:
        np.testing.assert_array_equal(again[name], found[name])
        assert (none[name].shape[1:], none[name].dtype.kind) == (found[name].shape[1:], found[name].dtype.kind)
    assert [*predictor({"image": paths[:1]})][:2] == ["image", "class"]  # a path is an ID
    assert not found["rejected"].any()


def test_a_predictor_says_at_once_what_it_cannot_do(my_head, onnx_file):
    """Not image by image. A head that changed between two processes is refused, unless its files were
    carried."""
    with pytest.raises(ZooError, match="'dcp_mimi' is neither a checkpoint folder nor a head of the zoo. Nearest"):
        Predictor("dcp_mimi")
    with pytest.raises(ZooError, match=r"name or folder of a head, .* not a DCP: pass the folder"):
        Predictor(dcp_zoo.create_model("dcp_mini"))
    with pytest.raises(ZooError, match="top_k must be at least 1"):
        Predictor("my_head", top_k=0)
    with pytest.raises(ZooError, match="is run as it was exported"):
        Predictor(onnx_file, reject=0.1)
    with pytest.raises(ZooError, match="A copy of a Predictor takes nothing else: give it to the first one"):
        Predictor(Predictor("my_head"), top_k=2, reject=0.1)
    with pytest.raises(ZooError, match="'image' has the images: pass image="):
        Predictor("my_head")({"bytes": [b""], "id": [1]})
    paths = {"image": sample_images()[:1]}
    named, carried = Predictor("my_head"), Predictor("my_head", carry=True)
    expected, sent = named(paths), [pickle.dumps(each) for each in (named, carried, Predictor(onnx_file, carry=True))]
    config = Path("my_head/config.json")
    config.write_text(config.read_text().replace("rose", "lily"))
    with pytest.raises(ZooError, match="my_head is another head than when this Predictor was made: make it again"):
        pickle.loads(sent[0])(paths)
    for name, values in Predictor(pickle.loads(sent[1]))(paths).items():
        assert (name == "image") or (values == expected[name]).all()
    exported = pickle.loads(sent[2])(paths)
    assert (exported["class"], exported["rejected"]) == (Predictor(onnx_file)(paths)["class"], [False])


def test_a_rank_picks_a_gpu(monkeypatch):
    """The latest that a call names, 0 as any other."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    predictor = Predictor(BUNDLED)
    for rank, device in ((3, "cuda:1"), (None, "cuda:1"), (0, "cuda:0")):
        with pytest.raises(ZooError, match=f"Device '{device}' is not available"):
            predictor({"image": []}, rank)
