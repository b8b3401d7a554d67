"""The first contact with real weights, rehearsed: Hub repos with the file names, keys and types of the real
ones, but small towers with random values."""

import errno
import json
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import open_clip
import pytest
import torch
from helpers import FEW_STEPS, offline
from safetensors.torch import load_file, save_file
from test_open_clip_models import write_tokenizer
from test_tower_kinds import small_timm
from upload_hub import Repo

import dcp_zoo
from dcp_zoo import FewShotClassifier, ZooError, create_model, hub
from dcp_zoo.files import sha256_of
from dcp_zoo.zoo.build import build_open_clip, plain_clip
from dcp_zoo.zoo.specs import ModelSpec, get_spec

EXPORTED = "dcp_pe_b16"  # a tower of timm; an export takes seconds, and those of open_clip are in test_export.py
SMALL_TIMM = {"depth": 3, "embed_dim": 64, "num_heads": 2}
BY_NAME = "open_clip:ViT-B-32/laion2b_s34b_b79k"  # which has no row in the table
MODELS = ["dcp_siglip2_b16", BY_NAME, pytest.param(EXPORTED, marks=pytest.mark.scripts)]
PREPROCESS = ("mean", "std", "interpolation", "resize_mode")


def write_repo(folder: Path, spec: ModelSpec) -> dict[str, bytes]:
    """Write the files of a CLIP's repo with random weights; their content by name."""
    folder.mkdir()
    config = open_clip.get_model_config(spec.clip)
    described = open_clip.get_pretrained_cfg(spec.clip, spec.clip_pretrained)
    clip = build_open_clip(config, quick_gelu=bool(described.get("quick_gelu")))
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}
    save_file(state, folder / hub.CLIP_WEIGHTS_NAME)
    preprocess = {name: described[name] for name in PREPROCESS}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (folder / "open_clip_config.json").write_text(text)
    if "hf_tokenizer_name" in config["text_cfg"]:
        write_tokenizer(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def small(config: dict) -> dict:
    """open_clip's config with narrow towers of few blocks."""
    vision, text = dict(config["vision_cfg"]), config["text_cfg"] | {"width": 64, "heads": 2, "layers": 3}
    if "timm_model_name" not in vision:
        vision |= {"width": 64, "head_width": 32, "layers": 3}
    return config | {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text}


@pytest.fixture(params=MODELS)
def model(request, uploads, tmp_path, monkeypatch) -> Iterator[ModelSpec]:
    """A model whose repo is on the Hub, and whose towers are small here."""
    spec = get_spec(request.param)
    config = open_clip.get_model_config(spec.clip)
    if "hf_tokenizer_name" in config["text_cfg"]:
        pytest.importorskip("transformers")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, spec.clip, small(config))
    with small_timm(SMALL_TIMM):
        files = write_repo(tmp_path / "repo", spec)
        uploads.repos[spec.clip_repo] = Repo(private=False)
        uploads.repos[spec.clip_repo].commit(files, spec.clip_revision)
        yield spec


def test_a_model_from_the_hub(model, flowers, run):
    """Downloaded, trained on, exported, and all of it again without a network."""
    photo, weights = flowers / "rose" / "1.jpg", flowers.parent / "repo"
    assert "Saved in head" in run.ok("train", flowers, "--model", model.name, "--output", "head")
    (file,) = (flowers.parent / "cache").glob(f"*/snapshots/*/{hub.CLIP_WEIGHTS_NAME}")
    assert sha256_of(file) == file.resolve().name == sha256_of(weights / file.name)
    clip = plain_clip(model.name).clip
    stored = load_file(file)
    assert clip.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in clip.state_dict().items())

    (online,) = json.loads(run.ok("predict", photo, "--head", "head", "--json"))
    is_exported = model.name == EXPORTED
    if is_exported:
        run.ok("export", "--head", "head", "--output", "head.onnx")
    with offline():
        (later,) = json.loads(run.ok("predict", photo, "--head", "head", "--json"))
        if is_exported:
            (exported,) = json.loads(run.ok("predict", photo, "--head", "head.onnx", "--json"))
            assert exported["predictions"][0]["class"] == online["predictions"][0]["class"]
    assert later == online


OPENAI = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
FIELD = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"
BIOMED = {
    "embed_dim": 512,
    "vision_cfg": {
        "timm_model_name": "vit_base_patch16_224",
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": 224,
    },
    "text_cfg": {
        "hf_model_name": BERT,
        "hf_tokenizer_name": BERT,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 256,
    },
}


def write_bert(folder: Path) -> dict[str, bytes]:
    """The files of a small BERT without weights."""
    from transformers import BertConfig, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a photo of rose tulip .".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=len(words), **sizes).save_pretrained(folder / "bert")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    return {path.name: path.read_bytes() for path in (folder / "bert").iterdir()}


def test_a_clip_of_a_field(uploads, flowers, run, tmp_path):
    """By its repo alone, with small towers: preprocessing and tokenizer are the repo's."""
    pytest.importorskip("transformers")
    config = small(BIOMED) | {"text_cfg": BIOMED["text_cfg"]}
    with small_timm(SMALL_TIMM):
        uploads.repos[BERT] = Repo(private=False)
        uploads.repos[BERT].commit(write_bert(tmp_path))
        torch.save(build_open_clip(config, False).state_dict(), tmp_path / "weights")
        described = json.dumps({"model_cfg": config, "preprocess_cfg": OPENAI}).encode()
        uploads.repos[FIELD] = Repo(private=False)
        weights = (tmp_path / "weights").read_bytes()
        uploads.repos[FIELD].commit({"open_clip_config.json": described, "open_clip_pytorch_model.bin": weights})
        run.ok("train", flowers, "--model", f"open_clip:hf-hub:{FIELD}", "--output", "head")
        cfg = create_model("local-dir:head", True).pretrained_cfg
        assert (list(cfg["mean"]), list(cfg["std"]), cfg["crop_mode"]) == (*OPENAI.values(), "center")
        assert "tulip" in run.ok("predict", flowers / "rose/1.jpg", "--head", "head", "--json")


def write_clip(folder: Path, described: dict, state: dict) -> str:
    """A folder with a CLIP's description and weights; its name as a model."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    save_file(state, folder / hub.CLIP_WEIGHTS_NAME)
    return f"open_clip:local-dir:{folder}"


@FEW_STEPS
@pytest.mark.parametrize("method", ["prolip", "dcp"])  # the first changes CLIP's weights
def test_no_door_opens_on_other_weights_of_clip(method, flowers, run, tmp_path):
    """Of whatever precision the head was when it was saved; here two blocks of the image tower change
    places."""
    described = {"model_cfg": small(open_clip.get_model_config("ViT-B-32")), "preprocess_cfg": {}}
    state = build_open_clip(described["model_cfg"], False).state_dict()
    name = write_clip(tmp_path / "clip", described, state)
    image = str(flowers / "rose" / "0.jpg")
    recipe = {"epochs": 1, "n_ctx": 1, "depth": 1} if method == "dcp" else {"epochs": 1}
    before = plain_clip(name).fingerprint()
    folder = dcp_zoo.train(name, flowers, method=method, recipe=recipe).half().save_pretrained(tmp_path / "head")
    assert create_model(str(folder), True).frozen.fingerprint() == before

    first, second = (f"visual.transformer.resblocks.{i}." for i in (0, 1))
    own = {"": "", first: second, second: first}
    starts = {key: next((start for start in (first, second) if key.startswith(start)), "") for key in state}
    swapped = {own[start] + key.removeprefix(start): state[key].contiguous() for key, start in starts.items()}
    write_clip(tmp_path / "clip", described, swapped)
    now = plain_clip(name).fingerprint()
    assert now[:16] == before[:16]  # the sum of all words is the same
    assert now[16:] != before[16:]
    message = f"was trained on other weights.* {before}, .* have {now}.*train the head"
    doors = [
        lambda: create_model(str(folder), True),
        lambda: FewShotClassifier.load(folder),
        lambda: dcp_zoo.predict(str(folder), image),
    ]
    if method == "dcp":  # this one takes a head of its own kind
        doors.append(lambda: dcp_zoo.load_head(create_model(name, "clip", n_ctx=1, depth=1), folder))
    for open_door in doors:
        with pytest.raises(ZooError, match=message):
            open_door()
    assert "other weights" in run.refused("predict", image, "--head", folder)


REPAIRS = {  # of a description of the same weights
    "pooling": {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}},
    "pixels": {"preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}},
}


@pytest.mark.parametrize("repair", REPAIRS.values(), ids=REPAIRS)
def test_a_repaired_description_makes_another_clip(repair, flowers, tmp_path):
    """Features that were kept before are not served, and a training that was stopped does not go on."""
    folder, images, labels = tmp_path / "clip", sorted(flowers.glob("*/[01].jpg")), ["rose"] * 2 + ["tulip"] * 2
    described = {"model_cfg": small(open_clip.get_model_config("ViT-B-32")), "preprocess_cfg": {}}
    name, options = f"open_clip:local-dir:{folder}", {"method": "dcp", "recipe": {"epochs": 2, "depth": 1, "n_ctx": 1}}

    def write() -> None:
        (folder / "open_clip_config.json").write_text(json.dumps(described))

    def features(memory: object) -> np.ndarray:
        return FewShotClassifier(name, method="gda", memory=memory).fit(images, labels).transform(images)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    folder.mkdir()
    write()
    save_file(build_open_clip(described["model_cfg"], False).state_dict(), folder / hub.CLIP_WEIGHTS_NAME)
    before = features(tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        dcp_zoo.train(name, images, labels, output=tmp_path / "head", callbacks=[stop], **options)
    for part, changes in repair.items():
        described[part] |= {k: described[part][k] | v if isinstance(v, dict) else v for k, v in changes.items()}
    write()
    plain = features(False)
    assert np.abs(before - plain).max() > 1e-3
    assert features(tmp_path / "kept") == pytest.approx(plain, abs=1e-5)
    with pytest.raises(ZooError, match="another run, which differs in (CLIP architecture|preprocessing)"):
        dcp_zoo.train(name, images, labels, output=tmp_path / "head", **options)


def test_a_clip_in_a_folder(flowers, run, tmp_path, monkeypatch):
    """As docs/models.md makes one of RemoteCLIP's weights, or a clone of a repo, with its tokenizer; a head
    of it loads from any working folder."""
    name, folder = "open_clip:local-dir:clip", tmp_path / "clip"
    pytest.importorskip("transformers")
    config = small(open_clip.get_model_config("ViT-B-16-SigLIP2"))
    assert "clip/open_clip_config.json of local-dir:" in run.refused("train", flowers, "--model", name)
    folder.mkdir()
    write_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    with small_timm(SMALL_TIMM):
        assert "No such file" in run.refused("train", flowers, "--model", name)
        save_file(build_open_clip(config, False).state_dict(), folder / hub.CLIP_WEIGHTS_NAME)
        audio = {"model_cfg": config | {"audio_cfg": {}}}  # as open_clip 4 has
        for wrong, message in ((audio, "not a CLIP of images and texts"), ({}, "not open_clip's")):
            (folder / "open_clip_config.json").write_text(json.dumps(wrong))
            assert message in run.refused("train", flowers, "--model", name)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        run.ok("train", flowers, "--model", name, "--output", "head")
        monkeypatch.chdir(flowers)
        run.ok("predict", flowers / "rose/1.jpg", "--head", tmp_path / "head")


CLIP = get_spec("small").clip_repo


def test_what_stops_a_download_is_said(uploads, monkeypatch):
    """The repo is gated; the disk is full, as the client sees before it writes; a proxy does not answer."""
    uploads.repos[CLIP] = Repo(private=False)
    uploads.repos[CLIP].commit({hub.CLIP_WEIGHTS_NAME: b"no weights"}, get_spec("small").clip_revision)

    def refused() -> str:
        with pytest.raises(ZooError) as caught:
            plain_clip("small")
        return str(caught.value)

    uploads.gated = {CLIP}
    error = refused()
    assert f"{CLIP} is gated: request access at {uploads.url}/{CLIP}" in error
    assert "hf auth login" in error
    uploads.gated = set()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        assert "cache is full or not writable" in refused()
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    huggingface_hub.close_session()
    hub.check_connection.cache_clear()
    error = refused()
    assert re.search(r"refused\)\. Check the network, HF_ENDPOINT, HF_TOKEN", error)
    huggingface_hub.close_session()
