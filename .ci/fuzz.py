"""Damage what the package reads at random and read it: each input is read, or refused with a ZooError.

    python .ci/fuzz.py --minutes 10             all kinds, each as long
    python .ci/fuzz.py --only pictures --keep FOLDER     where inputs that failed are; default: failed
    python .ci/fuzz.py --only pictures --first 4711      from this input on

The corpus are pictures of every format and mode that Pillow writes, the photographs of the package, a head
of the miniature with a text probe, another with a template, and files of labels, class names and sentences.
Bytes are flipped, set, cut, repeated and taken from another input; values and types in `config.json`, and
numbers of tensors, are replaced too. Failures are exceptions, folders elsewhere and more memory than
`MAX_MB`: the exit code is 1. A crash, or an input that takes longer than `HANG` seconds, ends the run at
once, with a traceback.
"""

import argparse
import faulthandler
import json
import random
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from dcp_zoo.data.images import check_complete, load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.zoo import build
from dcp_zoo.zoo.specs import get_spec

HANG, MAX_MB = 30.0, 1500
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "LAB"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
FRAMES: dict[str, Any] = {"save_all": True}
EXIF = b"Exif\0\0II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
OPTIONS: dict[str, Sequence[dict[str, Any]]] = {
    "TIFF": [FRAMES, *({"compression": kind} for kind in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits"))],
    "JPEG": [{"progressive": True, "exif": EXIF}],
    "GIF": [FRAMES],
    "WEBP": [FRAMES],
    "PNG": [FRAMES],
}
EXTREMES = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x80\0\0\0", b"\0\0\0\x80", b"\xff" * 8)
VALUES = (
    *(None, True, 0, 1, -1, 10**9, 10**20, 1e-30, 1e30, float("nan"), float("inf")),
    *("", "x", "{}", "{:>99}", "\ud800", "\x1b[2J", "a" * 300, [], [1], ["a"], {}, {"a": 1}, {"a": ["b"]}),
)
INFO = {  # of heads, besides what they have
    **{"dataset": "folder", "shots": 2, "seed": 1, "test_share": 0.3, "split_sha256": "0" * 64, "test_images": 9},
    **{"class_images": {"cat": 2, "dog": 0}, "labels": [["cat", 0], ["dog", "hound"]], "metrics": {"top1": 50.0}},
    "recipe": {"eval_batch_size": 16},
    **{"image_hashes": {"files": "0123456789ab cdef01234567", "pixels": "0123456789ab"}},
}
NAMES = ["cat", "dog", "owl", "saw"]
NUMBERS = (0.0, -1.0, 1e-30, 6e4, 1e14, 1e30, float("nan"), float("inf"))


# ------------------------------------------------------------------------------------------------------------- inputs


def pictures() -> list[bytes]:
    """Small pictures of every format and mode, some with more than one frame or compression; without those
    that this Pillow does not write."""
    noise, found = Image.effect_noise((23, 17), 80), [Path(path).read_bytes() for path in sample_images()[:2]]
    for name, modes in FORMATS.items():
        for mode, options in product(modes, ({}, *OPTIONS.get(name, ()))):
            if options and mode not in ("L", "RGB"):  # libtiff crashes
                continue
            image = noise.convert("RGB").convert(mode) if mode not in ("I;16", "LAB") else Image.new(mode, noise.size)
            more = {"append_images": [image.rotate(90)]} if "save_all" in options else {}
            with suppress(KeyError, OSError):
                image.save(buffer := BytesIO(), name, **options, **more)
                found.append(buffer.getvalue())
    return found


def damaged(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """The bytes with up to eight changes, most of them near the beginning, where headers are."""
    changed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        size = len(changed) or 1
        at = int(size * chance.random() ** chance.choice((1, 4)))
        kind = chance.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([chance.randrange(256)])
        elif kind == 1:
            extreme = chance.choice(EXTREMES)
            changed[at : at + len(extreme)] = extreme
        elif kind == 2 and chance.random() < 0.3:
            del changed[at:]
        elif kind == 3:
            del changed[at : at + chance.randint(1, 16)]
        elif kind == 4:
            changed[at:at] = changed[at : at + chance.randint(1, 64)]
        else:
            other = chance.choice(others)
            start = chance.randrange(len(other) or 1)
            changed[at : at + 32] = other[start : start + 32]
    return bytes(changed)


def fuzz_picture(corpus: list[bytes], chance: random.Random, folder: Path) -> Callable[[], object]:
    file = folder / "picture.jpg"
    file.write_bytes(damaged(chance.choice(corpus), corpus, chance))

    def read() -> None:
        check_complete(str(file))
        load_image(str(file))

    return read


def checkpoints() -> list[tuple[dict[str, Any], dict[str, Any], bytes]]:
    """Config, tensors and the file of tensors of two heads."""
    from safetensors.torch import load_file

    from dcp_zoo import create_model, predict
    from dcp_zoo.backbone.classes import TEMPLATE
    from dcp_zoo.heads.kinds import LinearHead

    dcp, found = create_model("dcp_mini.caltech101-16shot", True).eval(), []
    predict(dcp, sample_images()[:1])  # what this imports does not count
    clip, names = dcp.encoder, ["cat", "dog"]
    linear = LinearHead(clip, names, *clip.scaled(clip.zero_shot_classifier(names)), texts=TEMPLATE)
    linear.method = "zero-shot"
    for model in (dcp, linear):
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            tensors = Path(place, "model.safetensors")
            config = json.loads(Path(place, "config.json").read_text())
            config["dcp"] = INFO | config["dcp"]
            found.append((config, load_file(tensors), tensors.read_bytes()))
    return found


def fuzz_checkpoint(corpus: list[Any], chance: random.Random, folder: Path) -> Callable[[], object]:
    import torch
    from safetensors.torch import save

    config, tensors, data = chance.choice(corpus)
    text, kind = json.dumps(config, indent=1).encode(), chance.randrange(5)
    if kind == 0:
        text = damaged(text, [text], chance)
    elif kind == 1:
        text = json.dumps(_replaced(config, chance)).encode()
    elif kind == 2:
        text = json.dumps(config | {"dcp": _replaced(config["dcp"], chance)}).encode()
    elif kind == 3:
        data = damaged(data[: chance.choice((2000, len(data)))], [data], chance)
    else:
        name = chance.choice(sorted(tensors))
        tensor = tensors[name].clone()
        tensor.view(-1)[:: chance.choice((1, 7))] = torch.tensor(chance.choice(NUMBERS)).to(tensor)
        data = save(tensors | {name: tensor})
    (folder / "config.json").write_bytes(text)
    (folder / "model.safetensors").write_bytes(data)

    def read() -> None:
        from dcp_zoo import FewShotClassifier, create_model, predict
        from dcp_zoo.cli.show import describe_checkpoint, for_people

        for_people(describe_checkpoint("head", folder))
        model = create_model(f"local-dir:{folder}", True).eval()
        answers = predict(model, sample_images()[:1])
        assert answers[0][0].probability >= 0, "the probability is NaN"
        FewShotClassifier.load(folder)

    return read


def _replaced(value: Any, chance: random.Random) -> Any:
    """A copy of a JSON value with one of its parts replaced or removed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        name = chance.choice(sorted(value))
        if chance.random() < 0.1:
            return {key: part for key, part in value.items() if key != name}
        return value | {name: _replaced(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.6:
        at = chance.randrange(len(value))
        return [*value[:at], _replaced(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def labels() -> list[tuple[str, bytes]]:
    """Files that people write, by their names."""
    rows = [("file", "class"), *((f"{i}.jpg", NAMES[i % 4]) for i in range(8))]
    return [
        *(("labels.csv", "\n".join(map(mark.join, rows)).encode()) for mark in ",;\t"),
        ("names.txt", "\n".join(NAMES).encode()),
        ("sentences.json", json.dumps({name: [f"a {name}"] for name in NAMES}).encode()),
    ]


def fuzz_labels(corpus: list[tuple[str, bytes]], chance: random.Random, folder: Path) -> Callable[[], object]:
    from dcp_zoo.data import load_labelled
    from dcp_zoo.data.readers import read_classnames, read_descriptions

    name, content = chance.choice(corpus)
    others = [content for _, content in corpus]
    file = folder / name
    for i in range(8):
        (folder / f"{i}.jpg").touch()
    file.write_bytes(damaged(content, others, chance))
    readers: dict[str, Callable[[Path], object]] = {"names.txt": read_classnames, "sentences.json": read_descriptions}
    return lambda: readers.get(name, lambda path: load_labelled("folder", folder, path))(file)


KINDS: dict[str, tuple[Callable[[], list[Any]], Callable[[list[Any], random.Random, Path], Callable[[], object]]]] = {
    "pictures": (pictures, fuzz_picture),
    "checkpoints": (checkpoints, fuzz_checkpoint),
    "labels": (labels, fuzz_labels),
}


# ------------------------------------------------------------------------------------------------------------ running


def fuzz(kind: str, seconds: float, first: int, kept: Path) -> int:
    """Read inputs for some time; the failures. A crash or a hang ends this process: the input stays in
    `kept/last`."""
    make, damage = KINDS[kind]
    corpus, number, failures, until = make(), first, 0, time.monotonic() + seconds
    folder = kept / "last"
    folder.mkdir(parents=True, exist_ok=True)
    around = {path for path in kept.iterdir() if path.is_dir()}
    while time.monotonic() < until:
        read = damage(corpus, random.Random(f"{kind} {number}"), folder)
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            with suppress(ZooError):
                read()
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024  # KB on Linux
            assert used < MAX_MB, f"the process has used {used} MB"
            assert {path for path in kept.iterdir() if path.is_dir()} == around, "it wrote elsewhere"
        except Exception:
            failures += 1
            print(f"{kind}-{number}: {traceback.format_exc(limit=-3)}", flush=True)
            around.add(shutil.copytree(folder, kept / f"{kind}-{number}", dirs_exist_ok=True))
        faulthandler.cancel_dump_traceback_later()
        number += 1
    print(f"{kind}: {number - first} inputs, {failures} failures", flush=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--only", choices=KINDS)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("failed"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    faulthandler.enable()
    built = cache(
        lambda name, *options, make=build.build_clip: make(get_spec(name), *options)
    )  # takes most of the time
    build.build_clip = lambda spec, *options: built(spec.name, *options)
    kinds = [args.only] if args.only else list(KINDS)
    raise SystemExit(sum(fuzz(kind, 60 * args.minutes / len(kinds), args.first, args.keep) for kind in kinds) > 0)


if __name__ == "__main__":
    main()
