"""`dcp-zoo data download` from a local server: small archives in the real structure, and everything that
goes wrong."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from helpers import encoded, tar
from PIL import Image
from trees import LISTED, picture, rows, touch, write_tree
from upload_hub import Repo, UploadHub

from dcp_zoo.data import DATASETS, classnames, download, few_shot, load_split, packaged
from dcp_zoo.data.download import ARCHIVES, fetch_archive, unpack
from dcp_zoo.data.packaged import Archive
from dcp_zoo.errors import ZooError

PAGE = (Path(__file__).parents[1] / "docs/benchmarks.md").read_text()
PLACE, CUT, BUSY = "data/sets", ("GET", 206), ("GET", 503)


@pytest.fixture
def server(uploads, monkeypatch) -> UploadHub:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    uploads.repos[PLACE] = Repo(private=False)
    uploads.repos[PLACE].commit({})
    return uploads


def offer(server: UploadHub, name: str, content: bytes, **fields: object) -> Archive:
    server.files(PLACE)[name] = content
    return Archive(f"{server.url}/{PLACE}/resolve/main/{name}", hashlib.md5(content).hexdigest(), **fields)


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


CONTENT = bytes(range(256)) * 4000


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([CUT, CUT, CUT], ["bytes=512000-", "bytes=768000-", "bytes=896000-"]),
        ([CUT, ("GET", 200)], ["bytes=512000-"]),  # a server that starts again from the first byte
    ],
    ids=str,
)
def test_a_broken_download_is_continued(server, tmp_path, faults, ranges):
    archive = offer(server, "a.tar", CONTENT)
    server.faults += faults
    assert fetch_archive(archive, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ranges
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("later", [CONTENT, CONTENT[::-1]], ids=["same", "other"])
def test_the_next_call_continues_and_never_joins_two_versions(server, tmp_path, later):
    """By its checksum; a file without one is loaded from its beginning."""
    for archive in (offer(server, "a.tar", CONTENT), replace(offer(server, "b.tar", CONTENT), md5="")):
        server.faults[:] = [CUT, *[BUSY] * 9]
        with pytest.raises(ZooError, match="tar cannot be downloaded: .*503"):
            fetch_archive(archive, tmp_path)
        server.faults.clear()
        server.files(PLACE).update({"a.tar": later, "b.tar": later})
        if archive.md5 and later != CONTENT:
            with pytest.raises(ZooError, match="has not the published md5 .*deleted"):
                fetch_archive(archive, tmp_path)
            assert list(tmp_path.iterdir()) == []
        else:
            assert fetch_archive(archive, tmp_path).read_bytes() == later


@pytest.mark.parametrize("part", [CONTENT, CONTENT[::-1], CONTENT + b"more"], ids=["whole", "other", "longer"])
def test_nothing_follows_a_part_that_was_whole_when_its_process_died(server, tmp_path, part):
    archive = offer(server, "a.tar", CONTENT)
    (tmp_path / "a.tar.part").write_bytes(part)
    if part == CONTENT:
        assert fetch_archive(archive, tmp_path).read_bytes() == CONTENT
    else:
        with pytest.raises(ZooError, match="has not the published md5 .*deleted"):
            fetch_archive(archive, tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_dead_link_says_what_to_do(server, tmp_path):
    archive = offer(server, "a.tar", CONTENT)
    server.faults.append(("GET", 404))
    with pytest.raises(ZooError, match=f"cannot be downloaded: .*404.* put a.tar in {tmp_path}"):
        fetch_archive(archive, tmp_path)
    (tmp_path / "a.tar").write_bytes(CONTENT)  # done as told
    assert fetch_archive(archive, tmp_path).read_bytes() == CONTENT


def link(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (link("images/a.jpg"), "cannot be unpacked .*link"),
        (tar({"images/a.jpg": bytes(5000)})[:-40], "cannot be unpacked .* delete .*a.bin"),
        (b"<html>not found</html>", "cannot be unpacked .*not a .*tar"),
        (tar({"pictures/a.jpg": b"x"}), "Cannot write to .*No such file"),
    ],
    ids=["link", "cut", "html", "other"],
)
def test_bad_archives_leave_nothing(tmp_path, content, message):
    file = tmp_path / "a.bin"
    file.write_bytes(content)
    folder = tmp_path / "in" / "dataset"
    with pytest.raises(ZooError, match=message):
        unpack(Archive("http://x/a.bin", folders={"images": "images"}), file, folder)
    assert list(folder.iterdir()) == []


def offered(server: UploadHub, name: str, root: Path, make: Callable[[Path], object] = picture) -> tuple[Archive, ...]:
    """The dataset's archives in their real structure, with a tiny tree; the table's own, but for url and
    checksum."""
    write_tree(root, name, make)
    spec = DATASETS[name]
    folder = root / spec.folder
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    archives = []
    for archive in spec.archives:
        inside = {
            f"{place}/{path.removeprefix(f'{target}/')}": content
            for place, target in archive.folders.items()
            for path, content in files.items()
            if path.startswith(target)
        }
        content = files[archive.filename] if not archive.folders else tar(inside)
        if archive.inner:
            content = zipped({archive.inner: content})
        elif archive.filename.endswith(".zip"):
            content = zipped(inside)
        new = offer(server, archive.filename, content)
        archives.append(replace(archive, url=new.url, md5=new.md5))
    return tuple(archives)


def use_small(monkeypatch, name: str, archives: tuple[Archive, ...], root: Path) -> None:
    """The table's row with these archives and the counts of the tiny tree; its split is the tree's, not
    CoOp's."""
    split = load_split(name, root)
    counts = [len(split.train), len(split.val), len(split.test)]
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], archives=archives, counts=counts))
    tiny = rows(name) if name in LISTED else None
    monkeypatch.setattr(packaged, "split_rows", lambda dataset: tiny if dataset == name else None)


@pytest.mark.parametrize("name", ["caltech101", "stanford_cars", "food101", "fgvc_aircraft", "eurosat", "imagenet_a"])
def test_download(server, tmp_path, monkeypatch, run, name):
    source, target = tmp_path / "source", tmp_path / "DATA"
    archives = offered(server, name, source)
    use_small(monkeypatch, name, archives, source)
    server.faults += [CUT]
    out = run.ok("data", "download", name, "--data-root", target, "--agree")
    assert DATASETS[name].terms[:40] in out
    assert f"{name}: complete, split sha256 {load_split(name, source).sha256[:12]}" in out
    assert load_split(name, target).sha256 == load_split(name, source).sha256
    assert [*(target / ARCHIVES).iterdir()] == []

    requests = len(server.requests)
    code, out, _ = run("data", "download", name, "--data-root", target)  # complete: no request, no question
    assert (code, len(server.requests)) == (0, requests)
    assert DATASETS[name].terms not in out


def test_terms_are_asked_for(server, tmp_path, monkeypatch, run):
    archives = offered(server, "dtd", tmp_path / "source")
    use_small(monkeypatch, "dtd", archives, tmp_path / "source")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert "Nothing was downloaded" in run.refused("data", "download", "dtd", "--data-root", tmp_path / "DATA")
    assert server.requests == []
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    run.ok("data", "download", "dtd", "--data-root", tmp_path / "DATA")


def test_one_failure_does_not_stop_the_others(server, tmp_path, monkeypatch, run):
    archives = offered(server, "dtd", tmp_path / "source")
    use_small(monkeypatch, "dtd", archives, tmp_path / "source")
    gone = (replace(DATASETS["eurosat"].archives[0], url=f"{server.url}/{PLACE}/resolve/main/gone.zip"),)
    monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], archives=gone))
    code, out, err = run("data", "download", "eurosat", "dtd", "--data-root", tmp_path / "DATA", "--agree")
    assert (code, "dtd: complete" in out) == (2, True)
    for text in ("eurosat: ", "404", "Not complete: eurosat."):
        assert text in err
    with pytest.raises(ZooError, match="pacs_photo cannot be downloaded: choose from caltech101"):
        download.missing(["pacs_photo"], tmp_path)


@pytest.mark.scripts  # thousands of files
def test_the_page_unpacks_imagenet(tmp_path, monkeypatch):
    """docs/benchmarks.md, from archives in their real structure: tars in a tar, validation images, and the
    devkit."""
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    wnids, root = packaged.wnid_names(), tmp_path / "DATA/imagenet/images"
    root.mkdir(parents=True)
    image = encoded(Image.new("RGB", (8, 6)), "JPEG")
    synsets = [(i + 1, wnid, name, "", 0) for i, (wnid, name) in enumerate(reversed(wnids.items()))]
    types = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    savemat(tmp_path / "meta.mat", {"synsets": np.array(synsets, dtype=types)})
    order = [number * 7 % 1000 for number in range(1000)]  # the class of each validation image
    truth = "".join(f"{1000 - label}\n" for label in order).encode()
    devkit = {"meta.mat": (tmp_path / "meta.mat").read_bytes(), "ILSVRC2012_validation_ground_truth.txt": truth}
    made = {
        "train": tar({f"{wnid}.tar": tar({f"{wnid}_1.JPEG": image}, "w") for wnid in wnids}, "w"),
        "val": tar({f"ILSVRC2012_val_{i:08d}.JPEG": image for i in range(1000)}, "w"),
        "devkit": tar({f"ILSVRC2012_devkit_t12/data/{name}": content for name, content in devkit.items()}),
    }
    meta = {}
    for kind, (name, _) in imagenet.ARCHIVE_META.items():
        (root / name).write_bytes(made[kind])
        meta[kind] = name, hashlib.md5(made[kind]).hexdigest()
    monkeypatch.setattr(imagenet, "ARCHIVE_META", meta)
    monkeypatch.chdir(tmp_path)
    exec(
        "from torchvision.datasets import ImageNet" + PAGE.partition("datasets import ImageNet")[2].partition("```")[0]
    )
    split = load_split("imagenet", tmp_path / "DATA")
    assert split.classnames == classnames("imagenet")
    labels = {item.key.rpartition("_")[2]: item.label for item in split.test}
    assert [labels[f"{number:08d}.JPEG"] for number in range(1000)] == order


def test_packaged_splits_need_no_file(tmp_path):
    """DTD's whole split from the package, with images in the real layout; another split on disk is noted."""
    content = packaged.split_rows("dtd")
    for key in (key for part in content.values() for key, *_ in part):
        touch(tmp_path / "dtd/images" / key)
    split = load_split("dtd", tmp_path)
    assert [len(split.train), len(split.val), len(split.test)] == DATASETS["dtd"].counts
    assert split.note == ""
    file = tmp_path / "dtd" / DATASETS["dtd"].split_file
    file.write_text(json.dumps(content))
    assert load_split("dtd", tmp_path) == split
    file.write_text(json.dumps(content | {"val": content["val"][1:]}))
    assert f"{file} is not CoOp's split of dtd" in load_split("dtd", tmp_path).note


@pytest.mark.parametrize("name", [name for name in LISTED if packaged.split_rows(name)])
def test_packaged_splits_are_the_tables(name):
    content = packaged.split_rows(name)
    assert [len(content[part]) for part in ("train", "val", "test")] == DATASETS[name].counts
    names = dict(sorted({label: name for part in content.values() for _, label, name in part}.items()))
    assert list(names.values()) == classnames(name)


def test_a_split_is_recognised_by_its_draw(tmp_path):
    """Food-101 has no split in the package: one on disk is CoOp's if its draw is."""
    keys, file = packaged.drawn("food101"), tmp_path / "food-101" / "split_zhou_Food101.json"
    names = classnames("food101")
    content = {part: [[f"{part}/{key}", y, names[y]] for y, key in enumerate(keys)] for part in ("val", "test")}
    content["train"] = [[key, label, names[label]] for label, key in enumerate(keys)]
    for key, *_ in (row for part in content.values() for row in part):
        picture(tmp_path / "food-101/images" / key)
    file.write_text(json.dumps(content))
    split = load_split("food101", tmp_path)
    assert split.note == ""
    assert [item.key for item in few_shot(split, 1, 1).train] == keys
    content["train"][0], content["val"][0] = content["val"][0], content["train"][0]
    file.write_text(json.dumps(content))
    assert "is not CoOp's split of food101" in load_split("food101", tmp_path).note


def test_imagenets_names_are_in_the_package():
    names = packaged.wnid_names()
    assert list(names.values()) == classnames("imagenet")
    assert (names["n01440764"], len(names)) == ("tench", 1000)
