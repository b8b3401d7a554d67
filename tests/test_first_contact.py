"""The first contact with real weights, rehearsed: Hub repos with the file names, keys and types of the real ones, but
small towers with random values. `benchmarks/first_contact.py` does the same at full size."""

import errno
import json
import random
import re
from collections.abc import Iterator
from unittest import mock

import huggingface_hub
import open_clip
import pytest
import torch
from first_contact import MODELS, write_repo
from helpers import offline
from safetensors.torch import load_file
from test_open_clip_models import write_tokenizer
from test_tower_kinds import small_timm
from upload_hub import Repo

from dcp_zoo import hub
from dcp_zoo.files import sha256_of
from dcp_zoo.zoo.factory import plain_clip
from dcp_zoo.zoo.registry import ModelSpec, get_spec

SMALL_TIMM = {"depth": 3, "embed_dim": 64, "num_heads": 2}


def small(config: dict) -> dict:
    """open_clip's config with narrow towers of few blocks."""
    vision, text = dict(config["vision_cfg"]), config["text_cfg"] | {"width": 64, "heads": 2, "layers": 3}
    if "timm_model_name" not in vision:
        vision |= {"width": 64, "head_width": 32, "layers": 3}
    if "hf_tokenizer_name" in text:
        text["vocab_size"] = 100
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
        files = write_repo(tmp_path / "repo", spec, write_tokenizer)
        uploads.repos[spec.clip_repo] = Repo(private=False)
        uploads.repos[spec.clip_repo].commit({name: path.read_bytes() for name, path in files.items()})
        yield spec


def test_a_model_from_the_hub(model, flowers, run):
    """Downloaded, trained on, exported, and all of it again without a network."""
    photo, weights = flowers / "rose" / "1.jpg", flowers.parent / "repo"
    assert model.clip_repo not in run.ok("cache", "list")
    assert "Saved in head" in run.ok("train", flowers, "--model", model.name, "--output", "head")
    assert model.clip_repo in run.ok("cache", "list")
    (file,) = (flowers.parent / "cache").glob("*/snapshots/*/open_clip_[mp]*")
    assert sha256_of(file) == file.resolve().name == sha256_of(weights / file.name)
    clip = plain_clip(model.name).clip
    stored = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
    assert clip.state_dict().keys() == stored.keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in clip.state_dict().items())

    (online,) = json.loads(run.ok("predict", photo, "--head", "head", "--json"))
    run.ok("export", "--head", "head", "--output", "head.onnx")
    with offline():
        (later,) = json.loads(run.ok("predict", photo, "--head", "head", "--json"))
        (exported,) = json.loads(run.ok("predict", photo, "--head", "head.onnx", "--json"))
        error = run.refused("info", model.name, "--check")
    assert later == online
    assert exported["predictions"][0]["class"] == online["predictions"][0]["class"]
    assert f"{model.name} recognises" in error  # random weights do not
    assert f"dcp-zoo cache remove {model.name}" in error


# --- what goes wrong on the way ---------------------------------------------------------------------------------------

CLIP = get_spec("small").clip_repo


@pytest.fixture
def large(uploads) -> bytes:
    """What the repo of `--model small` holds here in place of weights, larger than the client's buffer."""
    content = random.Random(0).randbytes(2**25)
    uploads.repos[CLIP] = Repo(private=False)
    uploads.repos[CLIP].commit({hub.CLIP_WEIGHTS_NAME: content})
    return content


def test_a_lost_connection_goes_on_where_it_was(uploads, large, tmp_path):
    """Within a process. After a kill the client begins again, see `test_a_killed_download_is_no_checkpoint`."""
    uploads.faults = [(f"GET .*{hub.CLIP_WEIGHTS_NAME}", 206)]
    hub.fetch_clip(f"{CLIP}/")
    (file,) = tmp_path.glob(f"cache/*/snapshots/*/{hub.CLIP_WEIGHTS_NAME}")
    assert file.read_bytes() == large
    assert [int(wanted[6:-1]) > 2**20 for wanted in uploads.ranges] == [True]


def test_a_renamed_repo_is_followed(uploads, large):
    uploads.renamed, uploads.repos["new/name"] = {CLIP: "new/name"}, uploads.repos.pop(CLIP)
    hub.fetch_clip(f"{CLIP}/")


def test_what_stops_a_download_is_said(uploads, large, run, monkeypatch):
    """The repo is gated; the disk is full, as the client sees before it writes; a proxy does not answer."""
    uploads.gated = {CLIP}
    error = run.refused("info", "small", "--check")
    assert f"{CLIP} is gated: request access at {uploads.url}/{CLIP}" in error
    assert "hf auth login" in error
    uploads.gated = set()
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.file_download, "http_get", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
        assert "cache is full or not writable" in run.refused("info", "small", "--check")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    huggingface_hub.close_session()
    hub.check_connection.cache_clear()
    error = run.refused("info", "small", "--check")
    assert re.search(r"refused\), or HF_HUB_OFFLINE .* the network, or HF_ENDPOINT, or the proxy\.", error)
    huggingface_hub.close_session()
