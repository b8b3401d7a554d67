"""Reading images of every kind, and rejecting bad files."""

import os
import shutil
import socket
import sys
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from helpers import photo, png_that_claims
from PIL import EpsImagePlugin, Image
from PIL.JpegImagePlugin import JpegImageFile
from timm.data import create_transform as timm_transform

import dcp_zoo
from dcp_zoo.data import load_image, load_labelled, load_split
from dcp_zoo.data.images import UnsupportedImage, check_complete, picture_formats
from dcp_zoo.data.readers import read_classnames, read_descriptions
from dcp_zoo.data.unreadable import damaged, refuse
from dcp_zoo.errors import ZooError
from dcp_zoo.heads import file as head_file
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME
from dcp_zoo.zoo.registry import get_head
from dcp_zoo.zoo.specs import MODELS


def test_load_image_of_every_mode(tmp_path):
    """Also turned upright, as its EXIF says."""
    for mode, suffix in [("RGB", "jpg"), ("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("1", "png")]:
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (8, 6)).save(path)
        image = load_image(str(path))
        assert (image.mode, image.size) == ("RGB", (8, 6))
        np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(path).convert("RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (8, 6)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(str(tmp_path / "turned.jpg")).size == (6, 8)


def test_more_than_8_bits_are_scaled(tmp_path):
    grey = np.arange(0, 240, 5, np.uint8).reshape(6, 8)
    for name, values in {
        "a.png": grey.astype(np.uint16) * 257,
        "a.tif": grey.astype(np.uint16) * 257,
        "b.tif": grey.astype(np.int32) * 257,
        "e.tif": grey.astype(np.int32),
        "c.tif": grey.astype(np.float32) / 255,
    }.items():
        Image.fromarray(values).save(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(load_image(str(tmp_path / name)))[..., 1], grey, err_msg=name)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "d.tif")
    with pytest.raises(ZooError, match=r"d.tif: its grey levels go from 0 to 235, not from 0 to 1: save it in 8 bits"):
        load_image(str(tmp_path / "d.tif"))


NOT_REGULAR = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "device": lambda path: path.symlink_to("/dev/tty" if os.access("/dev/tty", os.R_OK) else "/dev/zero"),
}


@pytest.mark.parametrize("kind", NOT_REGULAR)
def test_what_is_no_file_does_not_hang(tmp_path, kind):
    """Not as an image, nor as a text, a table or a checkpoint."""
    for name in ("x.jpg", WEIGHTS_NAME):
        NOT_REGULAR[kind](tmp_path / name)
    for read in (load_image, check_complete):
        with pytest.raises(ZooError, match=r"x.jpg: it is a pipe, socket or device, not a file. Replace"):
            read(f"{tmp_path}/x.jpg")
    NOT_REGULAR[kind](text := tmp_path / "x.csv")
    for read in (partial(load_labelled, "folder", tmp_path), read_classnames, read_descriptions):
        with pytest.raises(ZooError, match="it is a pipe, socket or device"):
            read(text)
    shutil.copy(get_head("dcp_mini.caltech101-1shot").bundled_dir / CONFIG_NAME, tmp_path)
    with pytest.raises(ZooError, match="it is a pipe, socket or device"):
        head_file.read(tmp_path)


def test_other_programs_are_not_started(tmp_path, monkeypatch):
    """PIL reads EPS through Ghostscript, whatever the file is called."""
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "gs")
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: pytest.fail("started"))
    for name, data in {
        "a.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n",
        "a.ico": b"\0\0\1\0\1\0",
    }.items():
        for path in (tmp_path / name, tmp_path / "a.jpg"):
            path.write_bytes(data)
            with pytest.raises(UnsupportedImage, match="not in a supported format"):
                load_image(str(path))


def test_truncated_files_are_found_and_whole_ones_are_not_decoded_twice(tmp_path, monkeypatch):
    for suffix in ("jpg", "png", "gif"):
        path = photo(tmp_path / f"a.{suffix}")
        content = path.read_bytes()
        path.write_bytes(content + b"MotionPhoto")  # appended by some phones
        check_complete(str(path))
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(ZooError, match=f"Cannot read the image .*a.{suffix}: .*Replace the file"):
            check_complete(str(path))
        path.write_bytes(content)
        if suffix != "gif":
            with monkeypatch.context() as patch:
                patch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
                check_complete(str(path))


def test_only_our_own_limit_of_pixels_counts(tmp_path, monkeypatch):
    """PIL's, which is the whole process's, is left alone: other threads open images of their own."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # a photograph has 18,200 pixels: PIL raises
    path = str(photo(tmp_path / "a.jpg"))
    limits, opened = [], JpegImageFile._open
    monkeypatch.setattr(JpegImageFile, "_open", lambda self: limits.append(Image.MAX_IMAGE_PIXELS) or opened(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (130, 140)
        (tmp_path / "fits.png").write_bytes(png_that_claims(13_000))
        check_complete(str(tmp_path / "fits.png"))
    assert limits == [1_000]
    (tmp_path / "large.png").write_bytes(png_that_claims(14_000))
    Image.new("RGB", (20_000, 1)).save(tmp_path / "thin.png")  # 192 pixels high, it would have 4 million columns
    for name, message in (
        ("large.png", "14000 x 14000 pixels, more than the limit of 180,000,000"),
        ("thin.png", "20000 x 1 pixels, one side over 100 times the other"),
    ):
        with pytest.raises(ZooError, match=message):
            load_image(str(tmp_path / name))


HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def no_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    picture_formats.cache_clear()
    yield
    picture_formats.cache_clear()


def test_heic_names_the_plugin(flowers, no_heif):
    for name in ("rose/a.HEIC", "rose/c.jpg"):
        (flowers / name).write_bytes(HEIC_START)
    read = r"2 of 14 images cannot be read: .*rose/a.HEIC.*PIL cannot read HEIC .*\(pip install pillow-heif\)"
    items = load_split("folder", flowers).items
    with pytest.raises(ZooError, match=f"{read}.*Replace them, or leave them out"):
        refuse(items, damaged(items))


def test_heic_is_read_where_the_plugin_is_installed(flowers):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in picture_formats()
    photo(flowers / "rose" / "a.heic")
    assert load_image(str(flowers / "rose" / "a.heic")).size == (130, 140)
    assert len(load_split("folder", flowers).items) == 13


def test_the_preprocessing_is_timms_for_every_model():
    """Bit for bit, of photographs of odd sizes; models with the same preprocessing count once."""
    keys, seen = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"), set()
    rng = np.random.default_rng(0)
    photos = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in ((640, 427), (225, 301), (97, 240))
    ]
    for name in MODELS:
        cfg = dcp_zoo.get_pretrained_cfg(name)
        if (kind := str([cfg[key] for key in keys])) in seen:
            continue
        seen.add(kind)
        ours, theirs = dcp_zoo.create_transform(name), timm_transform(**{key: cfg[key] for key in keys})
        assert all(torch.equal(ours(photo), theirs(photo)) for photo in photos), name
    assert len(seen) > 3
