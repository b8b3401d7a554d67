"""The stock Hub client against a Hub in memory: downloads, pins, and one message for each kind of
failure."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from itertools import product
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pin_clips
import pytest
import timm
import torch
from helpers import http_server, offline, until, use_endpoint
from safetensors.torch import save_file
from shared import CommandLine
from upload_hub import TOKEN, Answers, UploadHub, serve_uploads

import dcp_zoo
from dcp_zoo import Predictor, ZooError, hub
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.files import sha256_of
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.release import publish, upload
from dcp_zoo.zoo import registry, specs
from dcp_zoo.zoo.build import plain_clip

MINI = "dcp_mini.caltech101-16shot"
OTHER = next(name for name, head in registry.trained_heads().items() if head.status == "bundled" and name != MINI)
MINI_REPO = f"dcp-zoo/{MINI}"
BUNDLED = registry.WEIGHTS / MINI
HEAD_REPO = "dcp-zoo/dcp_vitb16.imagenet-16shot"
CLIP_REPO = specs.MODELS["dcp_vitb16"].clip_repo


def checkpoint_files(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}


@pytest.fixture(scope="module")
def server() -> Iterator[UploadHub]:
    """A Hub with a miniature head in two revisions, the first one tagged, and a repo that lacks its
    weights."""
    with serve_uploads() as server:
        server.first = server.add(MINI_REPO, checkpoint_files(registry.WEIGHTS / OTHER), tag="v1")
        server.second = server.add(MINI_REPO, checkpoint_files(BUNDLED))
        server.add("dcp-zoo/half", {CONFIG_NAME: BUNDLED / CONFIG_NAME})
        yield server


SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 3},
}
CONFIGS = open_clip.factory._MODEL_CONFIGS


@pytest.fixture(scope="module")
def narrow(server, tmp_path_factory) -> Iterator[dcp_zoo.DCP]:
    """A ViT-B/16 with small towers and random weights; its CLIP and its head for ImageNet's 1,000 classes
    are on the Hub."""
    folder = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(specs.MODELS, "dcp_vitb16", replace(specs.MODELS["dcp_vitb16"], clip_revision=None))
        patch.setitem(CONFIGS, "ViT-B-16", SMALL)
        model = dcp_zoo.create_model("dcp_vitb16").eval()
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.half())  # what the files can hold
        model.stored_stats = torch.randn(2, 16, 64).half().float()
        model.save_pretrained(folder, dataset="imagenet", shots=16, seed=1)
        server.add(HEAD_REPO, checkpoint_files(folder))
        weights = folder / hub.CLIP_WEIGHTS_NAME
        save_file({name: t.half() for name, t in model.encoder.clip.state_dict().items()}, weights)
        server.add(CLIP_REPO, {weights.name: weights})
        model.folder = folder
        yield model


def set_row(monkeypatch, **changes: Any) -> str:
    """The name of a model whose row in models.yaml has these changes."""
    row = specs.MODELS["dcp_datacomp_b16"]
    monkeypatch.setitem(specs.MODELS, row.name, replace(row, **{"clip_revision": None} | changes))
    return row.name


@pytest.fixture
def moved(narrow, client, tmp_path) -> tuple[str, list[str]]:
    """A repo with weights of a CLIP, which were replaced by others, and its two commits."""
    repo, commits = specs.MODELS["dcp_datacomp_b16"].clip_repo, []
    for factor in (1, 2):
        weights = {name: factor * t for name, t in narrow.encoder.clip.state_dict().items()}
        save_file(weights, tmp_path / hub.CLIP_WEIGHTS_NAME)
        commits.append(client.add(repo, {hub.CLIP_WEIGHTS_NAME: tmp_path / hub.CLIP_WEIGHTS_NAME}))
    return repo, commits


@pytest.fixture
def client(server, tmp_path, monkeypatch) -> UploadHub:
    """The client of this process uses `server`, starts with an empty cache, and has no weights of CLIP
    pinned, as `server` has other commits than the Hub."""
    for name, row in specs.MODELS.items():
        monkeypatch.setitem(specs.MODELS, name, replace(row, clip_revision=None))
    use_endpoint(monkeypatch, server.url, tmp_path / "cache")
    monkeypatch.delenv("DCP_ZOO_HUB_ORG", raising=False)
    return server


def patch_manifest(monkeypatch, **entry: Any) -> None:
    """Make the miniature's head published, not bundled, with the values of `entry`."""
    head = registry.HeadEntry.named(MINI, **{"status": "published"} | entry)
    monkeypatch.setattr(registry, "all_heads", lambda: {MINI: head})


def trained(folder: Path) -> dcp_zoo.DCP:
    return dcp_zoo.create_model(f"local-dir:{folder}", True)


def same(a: dcp_zoo.DCP, b: dcp_zoo.DCP) -> bool:
    return torch.equal(a.prompts["text"], b.prompts["text"])


@pytest.mark.filterwarnings("ignore:.* is not pinned")
def test_a_published_head(narrow, client, tmp_path, caplog):
    """CLIP's weights and the head over HTTP; then, without a network, the cache suffices, and only the
    cache. The log says where both came from."""
    with (
        caplog.at_level("INFO", "dcp_zoo"),
        pytest.warns(UserWarning, match="is not pinned: this is its commit") as told,
    ):
        head = dcp_zoo.create_model("dcp_vitb16", pretrained="imagenet-16shot")
    assert (len(told), head.num_classes) == (1, 1000)
    commit = r"[0-9a-f]{40}"
    assert re.search(f"dcp_vitb16: open_clip_model.safetensors of {CLIP_REPO} at {commit}\n", caplog.text)
    assert re.search(rf"dcp: model.safetensors of dcp-zoo/dcp_vitb16\.imagenet-16shot at {commit}\n", caplog.text)
    with offline():
        again = dcp_zoo.create_model("dcp_vitb16", pretrained="imagenet-16shot")
    for found in (head, again):
        state = found.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in narrow.state_dict().items())
    shutil.rmtree(tmp_path / "cache" / f"models--{CLIP_REPO.replace('/', '--')}")
    message = f"open_clip_model.safetensors of {CLIP_REPO} is not in the local cache, and http.*HF_HUB_OFFLINE"
    with offline(), pytest.raises(ZooError, match=message):
        dcp_zoo.create_model("dcp_vitb16", pretrained="imagenet-16shot")


DOWNLOAD = """
import sys, json, open_clip, torch, dcp_zoo
from dataclasses import replace
from dcp_zoo.zoo.specs import MODELS
MODELS |= {name: replace(spec, clip_revision=None) for name, spec in MODELS.items()}
open_clip.factory._MODEL_CONFIGS["ViT-B-16"] = json.loads(sys.argv[3])
model = dcp_zoo.create_model("dcp_vitb16", pretrained="imagenet-16shot").eval()
with torch.inference_mode():
    torch.save(model(torch.load(sys.argv[1])), sys.argv[2])
"""


@contextmanager
def served_by_olah(root: Path, repos: dict[str, dict[str, Path]]) -> Iterator[str]:
    """The address of olah, in an environment of its own, with the configuration of `hub/mirror/` but for
    paths and port. Weights are LFS objects in its git repositories, as on the real Hub."""
    subprocess.run([sys.executable, "-m", "venv", root / "olah"], check=True)
    if subprocess.run([root / "olah/bin/pip", "install", "-q", "olah==0.5.4"], check=False).returncode:
        pytest.skip("pip cannot install olah")
    for repo_id, files in repos.items():
        git = ["git", "-C", root / "models" / repo_id, "-c", "user.name=tests", "-c", "user.email=tests@example.org"]
        (root / "models" / repo_id).mkdir(parents=True)
        subprocess.run([*git, "init", "-q", "-b", "main"], check=True)
        for name, source in files.items():
            place = root / "models" / repo_id / name
            if name.endswith(".safetensors"):
                digest = sha256_of(source)
                stored = place.parent / ".git/lfs/objects" / digest[:2] / digest[2:4] / digest
                stored.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, stored)
                size = stored.stat().st_size
                place.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n")
            else:
                shutil.copy(source, place)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "files"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = (Path(__file__).parents[1] / "hub/mirror/olah.toml").read_text().replace("/srv/hub-cache", f"{root}/cache")
    text = text.replace('"/srv/hub"', f'"{root}"').replace("8090", str(port)).replace("0.0.0.0", "127.0.0.1")
    (root / "olah.toml").write_text(text)
    server = subprocess.Popen([root / "olah/bin/olah-cli", "--config", root / "olah.toml"], cwd=root)
    try:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


@pytest.mark.scripts  # olah takes an environment of its own
def test_a_published_head_from_olah(narrow, tmp_path):
    """CLIP's weights and the head over HTTP from a Hub that others wrote, by `hub/mirror`'s configuration,
    in a new process that knows it only from HF_ENDPOINT."""
    torch.save(images := torch.randn(2, 3, 224, 224), tmp_path / "images")
    weights = {hub.CLIP_WEIGHTS_NAME: narrow.folder / hub.CLIP_WEIGHTS_NAME}
    with served_by_olah(tmp_path, {HEAD_REPO: checkpoint_files(narrow.folder), CLIP_REPO: weights}) as url:
        command = [sys.executable, "-c", DOWNLOAD, tmp_path / "images", tmp_path / "logits", json.dumps(SMALL)]
        env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home")}
        subprocess.run(command, env=env, check=True)
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(tmp_path / "logits"), narrow(images), rtol=1e-4, atol=1e-4)


def test_a_broken_download_is_no_checkpoint(client, tmp_path):
    weights = tmp_path / hub.CLIP_WEIGHTS_NAME
    weights.write_bytes(os.urandom(2**25))
    client.add("dcp-zoo/clip", {weights.name: weights})
    client.faults = [(place := "GET /dcp-zoo/clip/resolve", 206)] * 99
    with pytest.raises(ZooError, match="dcp-zoo/clip cannot be had: http.*try again"):
        hub.fetch_clip("dcp-zoo/clip/")
    client.faults.clear()
    cache = tmp_path / "cache"
    assert not list(cache.rglob(hub.CLIP_WEIGHTS_NAME))
    with offline(), pytest.raises(ZooError, match="is not in the local cache"):
        hub.fetch_clip("dcp-zoo/clip/")
    client.faults = [(place, 206)]  # within a process it goes on where it was
    client.ranges.clear()
    hub.fetch_clip("dcp-zoo/clip/")
    assert [int(wanted[6:-1]) > 2**20 for wanted in client.ranges] == [True]
    (file,) = cache.rglob(hub.CLIP_WEIGHTS_NAME)
    assert sha256_of(file) == file.resolve().name  # the client names blobs after the Hub's hash


def test_revisions_and_pins(client, monkeypatch):
    first, second = (trained(registry.WEIGHTS / name) for name in (OTHER, MINI))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(dcp_zoo.create_model(f"hf-hub:{MINI_REPO}@{client.first}", True), first)
    for revision, commit, expected in (("@v1", client.first, first), ("", client.second, second)):
        with pytest.warns(UserWarning, match=f"is not pinned: .* Pin it: hf-hub:{MINI_REPO}@{commit}$") as told:
            assert same(dcp_zoo.create_model(f"hf-hub:{MINI_REPO}{revision}", True), expected), revision
        assert len(told) == 1
    patch_manifest(monkeypatch, revision=client.first, sha256=sha256_of(registry.WEIGHTS / OTHER / WEIGHTS_NAME))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(dcp_zoo.create_model(MINI, True), first)  # the pinned one, not the newest
    assert dcp_zoo.get_pretrained_cfg(MINI)["hf_hub_id"] == f"{MINI_REPO}@{client.first}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert same(dcp_zoo.create_model(MINI, True), first)  # pinned and cached: no request


def test_weights_of_clip_are_of_their_pinned_revision(moved, tmp_path, monkeypatch):
    """Not the newest; also without a network."""
    repo, (first, second) = moved
    newest = plain_clip(name := set_row(monkeypatch)).fingerprint()
    head = tmp_path / "head"
    for revision in (second, first):
        clip = plain_clip(set_row(monkeypatch, clip_revision=revision))
        assert (clip.fingerprint() == newest) == (revision == second)
    dcp_zoo.create_model(name, "clip", classnames=["cat"], n_ctx=2, depth=1).save_pretrained(head)
    with offline():
        dcp_zoo.create_model(str(head), True)
        set_row(monkeypatch)
        with pytest.raises(ZooError, match="trained on other weights"):
            dcp_zoo.create_model(str(head), True)
        set_row(monkeypatch, clip_revision=first)
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(ZooError, match=f"of {repo} is not in the local cache"):
            plain_clip(name)


def test_a_pin_that_the_hub_does_not_know_costs_a_warning(moved, flowers, tmp_path, monkeypatch):
    """The newest weights are taken, also from the cache, and the head's fingerprint decides; a head trained
    on them says so."""
    first, second = moved[1]
    name, options = set_row(monkeypatch), {"classnames": ["cat"], "n_ctx": 2, "depth": 1}
    heads = {}
    for commit in (first, second):
        set_row(monkeypatch, clip_revision=commit)
        heads[commit] = dcp_zoo.create_model(name, "clip", **options).save_pretrained(tmp_path / commit)
    set_row(monkeypatch, clip_revision="0" * 40)
    shutil.rmtree(tmp_path / "cache")
    told = f"The pinned commit 0{{40}} could not be had: CLIP's weights are of {second}"
    with pytest.warns(UserWarning, match=told):
        assert plain_clip(name).note
    with offline(), pytest.warns(UserWarning, match=told):
        dcp_zoo.create_model(str(heads[second]), True)
    with offline(), pytest.warns(UserWarning, match=told), pytest.raises(ZooError, match="trained on other weights"):
        dcp_zoo.create_model(str(heads[first]), True)
    with pytest.warns(UserWarning, match=told):
        head = dcp_zoo.train(name, flowers, method="gda")
    assert re.search(told, head.info["clip_note"])


def test_a_repo_without_weights_is_not_pinned(uploads):
    uploads.add("dcp-zoo/half", {CONFIG_NAME: BUNDLED / CONFIG_NAME})
    with pytest.raises(ZooError, match="dcp-zoo/half has neither open_clip_model.safetensors nor"):
        pin_clips.newest_commit("dcp-zoo/half")


@pytest.mark.scripts
def test_maintainers_pin_what_the_hub_has(moved, monkeypatch, capsys, tmp_path):
    repo, (first, second) = moved
    (rows := tmp_path / "models.yaml").write_text(row := f"a:\n  clip: A\n  clip_repo: {repo}\n  image_size: 9\n\n")
    monkeypatch.setattr(pin_clips, "MODELS_FILE", rows)
    script = CommandLine(monkeypatch, capsys, pin_clips.app)
    for before in ("", f"  clip_revision: {first}\n"):
        rows.write_text(row.replace("  image", f"{before}  image"))
        assert f"{repo}: {second}, before {first if before else None}" in script.ok()
        assert rows.read_text() == row.replace("  image", f"  clip_revision: {second}\n  image")
    assert script.ok() == ""
    rows.write_text(other := rows.read_text() + row.replace(repo, "dcp-zoo/none"))
    assert "has no repo dcp-zoo/none" in script.refused()
    assert rows.read_text() == other


def test_a_wrong_hash_is_rejected_every_time(client, monkeypatch, tmp_path):
    patch_manifest(monkeypatch, revision=client.second, sha256="0" * 64)
    for _ in range(2):
        with pytest.raises(ZooError, match=r"is rejected: its sha256 is not 0000.*, which is pinned.*Delete"):
            dcp_zoo.create_model(MINI, True)
    patch_manifest(monkeypatch, revision=client.second, sha256=sha256_of(BUNDLED / WEIGHTS_NAME))
    (file,) = (tmp_path / "cache").rglob(WEIGHTS_NAME)
    file.resolve().write_bytes(file.read_bytes()[:-1] + b"x")  # on the disk, after a good download
    with pytest.raises(ZooError, match="is rejected") as error:
        dcp_zoo.create_model(MINI, True)
    Path(re.search(r"Delete (\S+) and try again", str(error.value))[1]).unlink()
    dcp_zoo.create_model(MINI, True)


def test_another_organisation(client, monkeypatch):
    patch_manifest(monkeypatch, revision=client.second, sha256="0" * 64)  # dcp-zoo's pin, not valid for others
    commit = client.add(f"own/{MINI}", checkpoint_files(BUNDLED))
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "own")
    with pytest.warns(UserWarning, match=f"own/{MINI} is not pinned: this is its commit {commit}"):
        assert same(dcp_zoo.create_model(MINI, True), trained(BUNDLED))


LATER = "dcp_mini.cubes-4shot"  # a dataset of a later release


@pytest.fixture
def index(client, tmp_path, monkeypatch) -> Callable[..., str]:
    """Publishes the miniature's head for a name of no release, and lists it with these changes."""

    def write(org: str = "dcp-zoo", **changes: Any) -> str:
        name = "dcp_mini.eurosat-1shot"
        row = {"license": "mit", "metrics": {"top1_stored": 60.0}, "sha256": sha256_of(BUNDLED / WEIGHTS_NAME)}
        row["revision"] = client.add(f"{org}/{name}", checkpoint_files(BUNDLED))
        client.add(f"{org}/{name}", checkpoint_files(registry.WEIGHTS / OTHER))  # later: not the listed commit
        (tmp_path / "heads.json").write_text(json.dumps({name: row | changes, "dcp_none.dtd-1shot": row, LATER: row}))
        client.add(f"{org}/{hub.INDEX_REPO}", {"heads.json": tmp_path / "heads.json"})
        hub.forget_index()
        return name

    yield write
    for repo in [repo for repo in client.repos if repo.endswith((hub.INDEX_REPO, "eurosat-1shot"))]:
        del client.repos[repo]
    hub.forget_index()


@pytest.mark.parametrize("org", ["dcp-zoo", "own"])
def test_a_head_appears_without_a_release(index, client, monkeypatch, run, org):
    """By its row in the index of the organisation: pinned, checked, and known offline."""
    if org != "dcp-zoo":
        monkeypatch.setenv("DCP_ZOO_HUB_ORG", org)
    name = index(org)
    requests = len(client.requests)
    assert dcp_zoo.get_pretrained_cfg(name)["architecture"] == "dcp_mini"
    assert dcp_zoo.create_model("dcp_mini").num_classes
    assert name not in dcp_zoo.list_models(include_tags=True)
    assert name not in dcp_zoo.list_models(pretrained=True)
    assert len(client.requests) == requests  # these do not ask
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert name in dcp_zoo.list_pretrained()
        assert sum("heads.json" in request for request in client.requests[requests:]) <= 3  # two HEAD and a GET
        assert name in dcp_zoo.list_heads(status="published")
        assert same(timm.create_model(name, pretrained=True), trained(BUNDLED))
        assert dcp_zoo.list_pretrained("*cubes*") == [LATER]
        assert "cubes" in run.ok("list", LATER)
        for each in (name, LATER):
            assert "60.0" in run.ok("info", each)
        assert re.search(rf"{name} +published +60\.0", run.ok("list", "dcp_mini.eurosat*"))
        with offline():
            hub.forget_index()
            assert same(dcp_zoo.create_model("dcp_mini", "eurosat-1shot"), trained(BUNDLED))


def test_an_index_is_not_trusted(index, client, monkeypatch):
    name = index(sha256="0" * 64)
    with pytest.raises(ZooError, match="is rejected: its sha256 is"):
        dcp_zoo.create_model(name, True)
    for changes in ({"revision": "main"}, {"sha256": None}, {"metrics": 3}, {"license": 3}):
        index(**changes)
        assert name not in dcp_zoo.list_pretrained(), changes
    client.add(f"dcp-zoo/{hub.INDEX_REPO}", {"heads.json": BUNDLED / WEIGHTS_NAME})
    hub.forget_index()
    with pytest.warns(UserWarning, match="The Hub may have more heads .*: the index of dcp-zoo is damaged"):
        assert set(dcp_zoo.list_pretrained(exclude_filters="*.clip")) == registry.trained_heads().keys()


SILENT: list[tuple[int, str]] = [  # the Hub's answers to the client, or what its place answers, and what is told
    (0, r"http://127.0.0.1:9, or a proxy before it, does not answer as a Hub does \(Connect.*\). Check the network"),
    (2, r"does not answer as a Hub does \(ReadTimeout.*\). Check the network, HF_ENDPOINT, HF_TOKEN and its rights"),
    (1, r"does not answer as a Hub does \(OfflineModeIsEnabled: .*HF_HUB_OFFLINE"),
    (200, r"does not answer as a Hub does \(.*\). Check the network"),
    (401, r"or a proxy before it, does not answer as a Hub does \(the error 401\)"),
    (403, r"does not answer as a Hub does \(the error 403\). Check .* HF_TOKEN"),
    (429, r"does not answer as a Hub does \(the error 429\). .* or try again later"),
    (503, r"does not answer as a Hub does \(the error 503\). .*HF_ENDPOINT"),
]


class LoginPage(BaseHTTPRequestHandler):
    """What a hotel's network answers."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET
    log_message = Answers.log_message


@contextmanager
def silent(status: int, client: UploadHub, monkeypatch) -> Iterator[None]:
    """A Hub that cannot be reached (0), must not be asked (1), keeps one waiting (2), or answers like this,
    whatever it is asked for."""
    client.faults = [("/resolve/|/api/models", status)] * 99 if status > 200 else []
    with monkeypatch.context() as patch, ExitStack() as stack:
        if status == 1:
            stack.enter_context(offline())
        elif status == 2:
            place = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            url, connect = f"http://127.0.0.1:{place.getsockname()[1]}", hub.check_connection
            patch.setattr(hub, "check_connection", lambda endpoint, *seconds: connect(endpoint, 0.1))
            use_endpoint(patch, url, Path(huggingface_hub.constants.HF_HUB_CACHE))
        elif status in (0, 200):
            url = stack.enter_context(http_server(LoginPage)) if status else "http://127.0.0.1:9"
            use_endpoint(patch, url, Path(huggingface_hub.constants.HF_HUB_CACHE))
        try:
            yield
        finally:
            client.faults = []


@pytest.mark.parametrize(("status", "told"), SILENT, ids=[str(status) for status, _ in SILENT])
def test_a_hub_that_does_not_answer_is_not_a_hub_without_a_head(status, told, index, client, monkeypatch, run):
    """Neither for one head nor in a list, which has what is in the cache; CLIP's weights are no better
    off."""
    name, head = index(), "dcp_vitb16.imagenet-16shot"
    assert name in dcp_zoo.list_pretrained()
    hub.forget_index()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with silent(status, client, monkeypatch):
        for pretrained, start in (("imagenet-16shot", f"{head} may be on the Hub, but it cannot be had"), ("clip", "")):
            with pytest.raises(ZooError, match=f"^{start}.*{told}") as error:
                dcp_zoo.create_model("dcp_vitb16", pretrained=pretrained)
            assert "planned" not in str(error.value)
        with pytest.raises(ZooError, match=f"has no head 'cubist-4shot'.* It may be on the Hub: .*{told}"):
            dcp_zoo.create_model("dcp_vitb16.cubist-4shot", True)
        for listed in (dcp_zoo.list_heads, dcp_zoo.list_pretrained):
            with pytest.warns(UserWarning, match=f"The Hub may have more heads than are known here: .*{told}") as notes:
                assert name in listed()
            assert len(notes) == 1
        with pytest.raises(ZooError, match=f"cannot be searched for heads: .*{told}"):
            dcp_zoo.list_heads(hub=True)
        for command in (("list", "dcp_vitb16.dtd*"), ("info", "dcp_vitb16.dtd-4shot"), ("info", "dcp_vitb16")):
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                code, _, err = run(*command)
            assert (code, err.count("The Hub may have more heads")) == (0, 1), command


def test_without_a_network_there_is_one_try(client, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client waits for another try"))
    started = time.perf_counter()
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    for other, pretrained in (("hf-hub:org/name", True), ("dcp_vitb16", "clip")):
        message = r"http://127.0.0.1:9.* does not answer.*HF_ENDPOINT.*local-dir:PATH"
        with pytest.raises(ZooError, match=message):
            dcp_zoo.create_model(other, pretrained)
    with pytest.raises(ZooError, match="does not answer.*HF_ENDPOINT"):
        publish.retried(lambda: upload(tmp_path, "org/name"))
    assert time.perf_counter() - started < 5


def test_a_planned_head_is_one_that_the_hub_says_it_has_not(client, monkeypatch):
    """Whether one is logged in or not; but what is gated exists, and another organisation's is no planned
    head."""
    head = "dcp_vitb32.eurosat-4shot-seed2"
    for token in ("", TOKEN):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ZooError, match=rf"{head} is planned: .*dcp-zoo train --head {head} .* dcp-zoo list"):
            dcp_zoo.create_model("dcp_vitb32", pretrained="eurosat-4shot-seed2")
    client.add(gated := "dcp-zoo/dcp_vitb32.dtd-1shot", checkpoint_files(BUNDLED))
    client.gated.add(gated)
    with pytest.raises(ZooError, match=f"may be on the Hub, .* {gated} is gated: request access"):
        dcp_zoo.create_model("dcp_vitb32.dtd-1shot", True)
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "own")
    with pytest.raises(ZooError, match=f"has no public repo own/{head}"):
        dcp_zoo.create_model(head, True)
    monkeypatch.setenv("DCP_ZOO_HUB_ORG", "some body")
    with pytest.warns(UserWarning, match="may have more heads than are known .*'some body/dcp-zoo-index'"):
        dcp_zoo.list_pretrained()
    with pytest.raises(ZooError, match=f"'some body/{head}' is not a Hub repo id"):
        dcp_zoo.create_model(head, True)


def test_no_head_is_needed_where_its_classifier_is_not_asked_for(narrow, moved, client):
    """As timm's users fine-tune: CLIP's own weights are enough, and a warning says so, until the head is
    published."""
    name, clip = "dcp_datacomp_b16", narrow.encoder.clip
    message = (
        rf"CLIP's own weights of {name} are loaded, .*as by {name}\.clip: its default head .* is not published yet"
    )
    for create, options in product(
        (timm.create_model, dcp_zoo.create_model), ({"num_classes": 10}, {"num_classes": 0})
    ):
        with pytest.warns(UserWarning, match=message) as told:
            model = create(name, pretrained=True, **options)
        assert len(told) == 1
        assert (model.num_classes, model.pretrained_cfg["hf_hub_id"]) == (options["num_classes"], moved[0])
        assert torch.equal(model.encoder.visual.conv1.weight, 2 * clip.visual.conv1.weight)
    with pytest.warns(UserWarning, match=message):
        net = timm.create_model(name, pretrained=True, features_only=True)
    assert torch.equal(net.model.encoder.visual.conv1.weight, 2 * clip.visual.conv1.weight)
    way_out = rf"is planned: nobody has .*CLIP's weights without a head: {name}\.clip, or pretrained='clip'"
    for model, options in (
        (name, {}),
        (name, {"num_classes": 1000}),
        (name, {"num_classes": 2, "classnames": ["cat", "dog"]}),
        (f"{name}.dtd-4shot", {"num_classes": 10}),
    ):
        with pytest.raises(ZooError, match=way_out):
            dcp_zoo.create_model(model, True, **options)
    with pytest.warns(UserWarning, match="is not pinned"):  # its head is on the Hub
        assert same(timm.create_model("dcp_vitb16", pretrained=True, num_classes=10), narrow)


def test_clips_own_weights_have_a_tag(moved, client, run):
    name = "dcp_datacomp_b16"
    assert f"{name}.clip" in timm.list_pretrained("dcp*")
    cfg = dcp_zoo.get_pretrained_cfg(f"{name}.clip")
    assert (cfg["hf_hub_id"], cfg["tag"], cfg["num_classes"], cfg["license"]) == (moved[0], "clip", 1000, "mit")
    states = []
    for create, model, options in (
        (dcp_zoo.create_model, name, {"pretrained": "clip"}),
        (dcp_zoo.create_model, f"{name}.clip", {"pretrained": True}),
        (timm.create_model, f"{name}.clip", {"pretrained": True}),
        (timm.create_model, name, {"pretrained": True, "pretrained_cfg": timm.get_pretrained_cfg(f"{name}.clip")}),
    ):
        torch.manual_seed(0)
        states.append(create(model, **options).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], tensor) for key, tensor in states[0].items())
    with pytest.raises(ZooError, match="names 'clip', but pretrained='dtd-4shot' another"):
        dcp_zoo.create_model(f"{name}.clip", "dtd-4shot")
    for refuses in (lambda: dcp_zoo.predict(f"{name}.clip", sample_images()), lambda: Predictor(f"{name}.clip")):
        with pytest.raises(ZooError, match=f"{name}.clip is CLIP without a head"):
            refuses()
    run.ok("info", f"{name}.clip")


def test_failures(client, tmp_path):
    client.faults = [("GET /dcp-zoo/cut/resolve", 0)] * 99
    client.add("dcp-zoo/cut", checkpoint_files(BUNDLED))
    for name, pretrained, message in (
        ("hf-hub:dcp-zoo/none", True, "has no repo dcp-zoo/none, or it is private.*HF_TOKEN"),
        ("hf-hub:dcp-zoo/half", True, f"dcp-zoo/half has no file {WEIGHTS_NAME}"),
        (f"hf-hub:{MINI_REPO}@v9", True, f"{MINI_REPO} has no revision 'v9'"),
        ("hf-hub:dcp-zoo/cut", True, "dcp-zoo/cut cannot be had: http.*try again"),
        ("hf-hub:../../etc/passwd", True, "is not a Hub repo id"),
        ("dcp_vitb32", "clip", "has no repo timm/vit_base_patch32_clip_224.openai"),
    ):
        with pytest.raises(ZooError, match=message):
            dcp_zoo.create_model(name, pretrained)
    client.faults.clear()
    assert not list(tmp_path.rglob(f"snapshots/*/{WEIGHTS_NAME}"))
