"""Checkpoints: round trip, size, what timm reads, and everything that must be rejected."""

import copy
import json
import os
import re
import shutil
import sys
from itertools import cycle
from pathlib import Path
from typing import is_typeddict

import pytest
import timm
import torch
from helpers import close, write_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from dcp_zoo import DCP, ZooError, create_model, create_transform, get_pretrained_cfg, load_head
from dcp_zoo.backbone.classes import class_texts
from dcp_zoo.backbone.mini import MINI_CFG
from dcp_zoo.data.images import normalise
from dcp_zoo.fields import kinds_of
from dcp_zoo.files import LOCK, locked, sha256_of, write_file
from dcp_zoo.heads.config import COUPLINGS, WEIGHTS_NAME, DCPConfig, HeadConfig, is_checkpoint, read_config
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.prediction import Predictor

NAMES = ["ant", "wild_cat", "emu"]
SIDE, DT = MINI_CFG["image_size"], MINI_CFG["text_cfg"]["width"]
IMAGES = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mini() -> DCP:
    torch.manual_seed(0)
    model = create_model("dcp_mini", "clip", classnames=NAMES, n_ctx=4).eval()
    model.store_stats(IMAGES)
    return model


@pytest.fixture
def folder(mini, tmp_path):
    return mini.save_pretrained(tmp_path / "head", dataset="animals", shots=2, seed=1)


@pytest.mark.parametrize(("coupling", "with_stats"), [*zip(COUPLINGS, cycle((True, False)), strict=False)])
@torch.no_grad()
def test_round_trip(tmp_path, coupling, with_stats):
    args = {"n_ctx": 3, "depth": 2, "pooling": "max", "share_cmpa": False, "coupling": coupling}
    model = create_model("dcp_mini", "clip", classnames=NAMES, **args).eval()
    if with_stats:
        model.store_stats(IMAGES)
    model.save_pretrained(tmp_path, dataset="animals")
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert {k: getattr(again.config, k) for k in args} == args
    assert (again.classnames, again.info["dataset"], again.stats) == (NAMES, "animals", model.stats)
    assert torch.allclose(again(IMAGES), model(IMAGES), atol=1e-5)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "config.json").read_text()


def test_only_registered_heads_have_a_tag(folder, tmp_path):
    """A user's head is not mistaken for the model's default one, in its config and in exported files."""
    own = create_model(f"local-dir:{folder}", pretrained=True)
    bundled = create_model("dcp_mini.caltech101-1shot", pretrained=True)
    bundled.save_pretrained(tmp_path)
    for place in (folder, tmp_path):
        assert not {"tag", "file", "license"} & json.loads((place / "config.json").read_text())["pretrained_cfg"].keys()
    assert (own.pretrained_cfg.get("tag"), own.fuse().info["tag"]) == (None, None)
    assert (bundled.pretrained_cfg["tag"], bundled.fuse().info["tag"]) == ("caltech101-1shot", "caltech101-1shot")


def test_only_what_trained_is_stored_in_float16_if_that_is_exact(folder, mini, tmp_path):
    assert load_file(folder / "model.safetensors")["prompts.text"].dtype == torch.float32
    with torch.no_grad():
        for tensor in mini.to_state().values():
            tensor.copy_(tensor.half())
    state = load_file(mini.save_pretrained(tmp_path) / "model.safetensors")
    trained = {n for n, p in mini.named_parameters() if p.requires_grad}
    assert state.keys() == trained | {"context"}
    assert {t.dtype for t in state.values()} == {torch.float16}
    assert state["context"].shape == (5, 4, 256)


@torch.no_grad()
def test_a_folder_gives_what_is_asked_for(folder, mini, tmp_path):
    """Random weights without `pretrained`, which is warned about; not the trained prompts for "clip", and no
    other head than its own."""
    with pytest.warns(UserWarning, match="pretrained=True"):
        model = create_model(f"local-dir:{folder}")
    assert (model.classnames, model.stored_stats) == (NAMES, None)
    assert not torch.equal(model.encoder.visual.proj, mini.encoder.visual.proj)
    fresh = create_model(f"local-dir:{folder}", "clip")
    assert (fresh.stored_stats, fresh.info) == (None, {})
    assert torch.equal(fresh.encoder.visual.proj, mini.encoder.visual.proj)
    assert not close(fresh.prompts["text"], mini.prompts["text"], 0.1)
    for wrong, message in (
        ({"pretrained": "imagenet-16shot"}, "which is one head: 'imagenet-16shot': choose from True, False, clip"),
        ({"pretrained": True, "n_ctx": 8}, "other options, .*n_ctx=4.*: omit n_ctx"),
    ):
        with pytest.raises(ZooError, match=message):
            create_model(f"local-dir:{folder}", **wrong)
    head = LinearHead(mini.encoder, NAMES, torch.zeros(3, 512), torch.zeros(3))
    head.method = "gda"
    with pytest.raises(ZooError, match="head of gda has no fresh prompts"):
        create_model(f"local-dir:{head.save_pretrained(tmp_path / 'gda')}", "clip")


def test_a_crash_while_writing_leaves_the_old_checkpoint(folder, mini, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half_written(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half_written)
    with pytest.raises(ZooError, match=r"No space left.*another directory"):
        mini.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


WRITING = {"open", "write", "close", "__exit__", "fsync", "chmod", "replace", "rename", "unlink", "remove", "mkdir"}


def after_each_kill(save, folder: Path, copies: Path) -> list[Path]:
    """Copies of a folder as it was before each call of the system, by this thread, that may write."""
    seen: dict[tuple, Path] = {}

    def before(_, event: str, function) -> None:
        if event == "c_call" and function.__name__ in WRITING:
            files = sorted(path for path in folder.iterdir() if path.name != LOCK)
            state = tuple((path.name, path.read_bytes()) for path in files)
            if state not in seen:
                seen[state] = Path(shutil.copytree(folder, copies / str(len(seen))))

    sys.setprofile(before)
    try:
        save()
    finally:
        sys.setprofile(None)
    return [*seen.values()]


def test_a_kill_at_any_point_of_a_save_leaves_the_old_head_or_the_new_one(mini, tmp_path):
    """Whole, also where the save before was killed between its two files."""
    killed = mini.save_pretrained(tmp_path / "head", note=0)
    head, again = (create_model(f"local-dir:{killed}", True) for _ in range(2))
    for save in (1, 2):
        load_head(head, killed).prompts["text"].data.fill_(save)
        places = after_each_kill(lambda: head.save_pretrained(killed, note=save), killed, tmp_path / f"{save}")  # noqa: B023
        found = []
        for place in places:
            load_head(again, place)
            found.append(again.info["note"])
            assert found[-1] == 0 or (again.prompts["text"] == found[-1]).all()
        assert found == sorted(found)
        assert {*found} == {save - 1, save}
        assert sorted(path.name for path in killed.iterdir()) == ["config.json", WEIGHTS_NAME]
        between = [place for place in places if sha256_of(place / WEIGHTS_NAME) != read_config(place)["weights_sha256"]]
        killed = between[-1]
        assert Predictor(killed, carry=True).backend.head.info["note"] == save
    empty = tmp_path / "empty"
    empty.mkdir()
    places = after_each_kill(lambda: head.save_pretrained(empty), empty, tmp_path / "first")
    whole = [place for place in places if is_checkpoint(place)]
    assert 0 < len(whole) < len(places)
    for place in whole:
        load_head(again, place)


def test_another_head_is_replaced_only_if_that_is_asked_for(folder, mini, tmp_path):
    """Not this one, as it was loaded or saved, whatever has been trained since."""
    again = create_model(f"local-dir:{folder}", True)
    for place in (folder, tmp_path / "best", folder, tmp_path / "best"):
        again.save_pretrained(place)
        again.prompts["text"].data.add_(0.25)
    other = create_model("dcp_mini", "clip", classnames=["cat", "dog"], n_ctx=4)
    again.set_classnames(["ant", "emu"])
    for head in (other, again, create_model("dcp_mini", "clip", classnames=NAMES, n_ctx=4)):
        with pytest.raises(ZooError, match=r"another head, of 3 classes \(ant, wild_cat, emu\).*overwrite=True"):
            head.save_pretrained(folder)
        with pytest.raises(ZooError, match="another head"):
            timm.models.save_for_hf(head, folder)
    assert read_config(folder)["label_names"] == NAMES
    other.save_pretrained(folder, overwrite=True)
    assert read_config(folder)["label_names"] == ["cat", "dog"]
    (folder / "config.json").write_text("{")
    with pytest.raises(ZooError, match="another head, which cannot be read"):
        other.save_pretrained(folder)
    other.save_pretrained(folder, overwrite=True)


def test_values_are_added_to_what_a_head_says_of_itself(mini, tmp_path):
    head = create_model("dcp_mini.caltech101-1shot", True)
    info = dict(head.info)
    again = create_model(str(head.save_pretrained(tmp_path, note="kept", seed=7)), True)
    assert again.info == info | {"note": "kept", "seed": 7}
    assert head.info == info
    with pytest.raises(ZooError, match="config.json says method, texts of the head itself"):
        head.save_pretrained(tmp_path, texts="{}", method="mine")


def test_a_head_may_not_know_its_clip(folder):
    """It loads, and says so once."""
    config = json.loads((folder / "config.json").read_text())
    del config["dcp"]["clip_fingerprint"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="trained on is unknown: they were not loaded in float32") as caught:
        create_model(f"local-dir:{folder}", True)
    assert len(caught) == 1


def test_heads_on_one_clip_prepare_images_each_in_their_way(mini):
    """The weights are shared, and nothing that the other head reads."""
    other = LinearHead(mini.frozen, NAMES, torch.zeros(len(NAMES), mini.frozen.num_features), torch.zeros(len(NAMES)))
    other.pretrained_cfg = {"crop_pct": 0.8}
    assert mini.pretrained_cfg["crop_pct"] != 0.8
    assert other.encoder.clip is mini.encoder.clip
    assert other.encoder.preprocessing != mini.encoder.preprocessing


def test_images_become_what_the_checkpoint_says(folder, mini, tmp_path):
    """In the model, by name, in workers that decode, in what is exported."""
    image = Image.effect_noise((250, 200), 90).convert("RGB")
    before, plain = dict(mini.pretrained_cfg), create_transform(mini)(image)
    given = {"crop_pct": 0.8, "mean": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    head = create_model(f"local-dir:{folder}", True)
    for change in (lambda cfg: cfg.__setitem__("mean", given["mean"]), lambda cfg: cfg.update(given)):
        with pytest.raises(ZooError, match="would be lost. Set what shall change: model.pretrained_cfg = "):
            change(head.pretrained_cfg)
    assert json.loads(json.dumps(copy.deepcopy(head.pretrained_cfg)))["label_names"] == NAMES
    for wrong, message in (
        ({"num_classes": 5}, "of .'input_size', .*, num_classes is none"),
        ({"crop_mode": "border"}, "crop_mode must be center or squash, not 'border'"),
        ({"mean": 0.5}, "mean must be a tuple"),
    ):
        with pytest.raises(ZooError, match=message):
            head.pretrained_cfg = wrong
    head.pretrained_cfg |= given
    expected = create_transform(head)(image)
    assert not close(expected, plain, 0.1)
    place = str(head.save_pretrained(tmp_path / "changed"))
    loaded, fresh = create_model(place, True), create_model(place, "clip")
    other = load_head(create_model("dcp_mini", "clip", classnames=NAMES, n_ctx=4), place)
    for each in (loaded, fresh, other, loaded.fuse(), place):
        assert torch.equal(create_transform(each)(image), expected)
    pixels = Predictor(place).decode({"image": [image]})["image"]
    assert torch.equal(torch.from_numpy(normalise(pixels, loaded.pretrained_cfg))[0], expected)
    assert get_pretrained_cfg(place).items() >= given.items()
    assert mini.pretrained_cfg == before


def test_a_head_is_not_written_while_another_process_does(folder, mini, monkeypatch):
    monkeypatch.setattr("dcp_zoo.heads.file.SAVE_SECONDS", 0.1)
    with locked(folder / LOCK, ""), pytest.raises(ZooError, match="Another process trains or saves a head"):
        mini.save_pretrained(folder)
    mini.save_pretrained(folder)


def test_a_link_is_written_through_and_no_device_is_replaced(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    write_file(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ZooError, match=f"Cannot write to {place}: it is a (folder|pipe, socket or device), not a"):
            write_file(place, "new")
    assert (tmp_path / "pipe").is_fifo()


def test_modes_are_the_users(mini, tmp_path):
    """New files as the umask says, also with names of the longest kind; replaced ones keep theirs."""
    before = os.umask(0o027)
    try:
        weights = mini.save_pretrained(tmp_path) / WEIGHTS_NAME
        assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o640"}
        weights.chmod(0o664)
        mini.save_pretrained(tmp_path)
        write_file(tmp_path / ("ä" * 125 + ".json"), "{}")
    finally:
        os.umask(before)
    assert oct(weights.stat().st_mode & 0o777) == "0o664"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"prompts.text": None}, "does not fit dcp_mini .*: missing or unexpected prompts.text"),
        ({"prompts.extra": torch.ones(2)}, "does not fit dcp_mini .*: missing or unexpected prompts.extra"),
        ({"context": torch.ones(5, 4, 64)}, r"does not fit dcp_mini .*stored_stats.*\[5, 4, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, mini, tensors, message):
    """A head that has some of them answers nothing."""
    head, state = copy.deepcopy(mini), load_file(folder / WEIGHTS_NAME) | tensors
    write_weights(folder, {name: tensor for name, tensor in state.items() if tensor is not None})
    with pytest.raises(ZooError, match=message):
        load_head(head, folder)
    with pytest.raises(ZooError, match="has no classes"):
        head.predict(torch.ones(1, 3, 192, 192))


def test_a_damaged_file_or_another_heads_is_refused(folder):
    path = folder / WEIGHTS_NAME
    content, tensors = path.read_bytes(), load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    huge = json.dumps({"x": {"dtype": "F16", "shape": [50_000, 100_000], "data_offsets": [0, 10**10]}}).encode()
    huge = len(huge).to_bytes(8, "little") + huge  # of 10 GB that are not there
    for other in (path.read_bytes(), content[:5000], content[:5], huge, b"cos\nmkdir\n(S'executed'\ntR."):
        path.write_bytes(other)
        with pytest.raises(ZooError, match=r"model\.safetensors is damaged"):
            create_model(f"local-dir:{folder}", True)
    path.unlink()
    for place, missing in ((folder, r"no model\.safetensors"), (folder / "nothing", "neither a checkpoint folder")):
        with pytest.raises(ZooError, match=missing):
            create_model(f"local-dir:{place}", True)


def test_bad_config(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for text, message in (
        ("{", "damaged"),
        (json.dumps(config | {"dcp": {}}), "dcp.format_version is missing; dcp.clip is missing"),
        (json.dumps(config | {"model_args": config["model_args"] | {"heat": 1}}), "model_args.heat is none of n_ctx"),
        (json.dumps(config | {"label_names": []}), "label_names is empty"),
        (json.dumps(config | {"architecture": "dcp_huge"}), "Unknown model 'dcp_huge'"),
        (json.dumps({"dcp": {"format_version": 99}}), "format_version must be 4, not 99.*upgrade dcp_zoo"),
    ):
        path.write_text(text)
        with pytest.raises(ZooError, match=message):
            create_model(f"local-dir:{folder}", True)


WRONG = (True, 1.5, -1, 10**400, float("nan"), "text", None, [1], {"ant": [1]}, {"ant": {"ant": "text"}})


def fields(kind, prefix=""):
    """The names of all fields, those of nested ones too."""
    for name, inner in kinds_of(kind).items():
        yield prefix + name
        if is_typeddict(inner):
            yield from fields(inner, f"{prefix}{name}.")


def test_a_field_of_the_wrong_type_is_named(folder):
    """By the one reader of all doors: of ten values at most two are of a field's type. None ends in a
    traceback."""
    path = folder / "config.json"
    good = path.read_text()
    for field in (*fields(HeadConfig), *fields(DCPConfig, "model_args.")):
        found = []
        for value in WRONG:
            config = place = json.loads(good)
            *outer, last = field.split(".")
            for name in outer:
                place = place.setdefault(name, {})
            place[last] = value
            path.write_text(json.dumps(config))
            try:
                read_config(folder)
            except ZooError as error:
                found.append(str(error))
        assert len(found) >= len(WRONG) - 2, field
        assert all(re.search(rf"config\.json: .*{field}", text) for text in found), found


def test_what_cannot_be_read_is_not_saved(tmp_path):
    model = create_model("dcp_mini", classnames=NAMES)
    with pytest.raises(ZooError, match="dcp.shots must be an integer or null, not 'two'"):
        model.save_pretrained(tmp_path, shots="two")
    model.prompts["text"].data[0, 0] = float("nan")
    with pytest.raises(ZooError, match="NaN or infinity in prompts.text"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_template_takes_the_name_alone():
    template = "{} {:>999999999} {0.__class__} {x} {"
    assert class_texts(["wild_cat"], template) == (["wild cat {:>999999999} {0.__class__} {x} {"], None)
