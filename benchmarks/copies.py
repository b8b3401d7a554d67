"""Which copies of a photograph are found as copies of it, and which other photographs are taken for copies.

    python benchmarks/copies.py --data-root DATA            writes results/copies.csv: the sets for choosing
    python benchmarks/copies.py --data-root DATA --report   the sets for reporting

DATA is as in `sets.py`. Of each set `PHOTOGRAPHS` are drawn, and `ALTERED` of them are altered in each of
`WAYS`, saved as JPEG, and sought among all. `alone` are pairs among the photographs themselves, some of
which are copies in truth.
"""

import io
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from bursts import MODEL, read, variant
from growing import GrowingTable
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps
from sets import CHOOSING, REPORTING, SETS

from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.data import load_image
from dcp_zoo.data.groups import near_copies
from dcp_zoo.data.images import load_with_facts
from dcp_zoo.zoo.build import plain_clip

RESULTS = Path(__file__).parent / "results" / "copies.csv"
COLUMNS = ("weights", "set", "copy", "images", "found", "wrong")
PHOTOGRAPHS = 200
ALTERED = 20
COLORS = ("black", "white", "gray", "navy")
QUARTERS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with the data sets.")],
    report: Annotated[bool, typer.Option(help="The sets for reporting.")] = False,
) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:3])
    clip = plain_clip(MODEL)
    weights = weights_id(MODEL)

    def looked_at(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        facts = np.stack([load_with_facts(image)[1].numbers for image in images])
        return read(clip, images)[:, : sum(list(clip.parts.values())[:2])].numpy(), facts

    for name in REPORTING if report else CHOOSING:
        if (weights, name, "alone") in table:
            continue
        with TemporaryDirectory() as folder:
            _, items, _ = SETS[name](data_root, Path(folder))
            drawn = random.Random(0).sample(items, min(PHOTOGRAPHS, len(items)))
            photos = [load_image(item.path) for item in drawn]
        own = looked_at(photos)
        alone = near_copies(*own)
        rows = []
        for copy, alter in WAYS.items():
            rng = random.Random(1)
            altered = looked_at([saved(alter(photo, rng), rng) for photo in photos[:ALTERED]])
            pairs = near_copies(*map(np.concatenate, zip(own, altered, strict=True)))
            of_altered = {(i, j - len(photos)) for i, j in pairs if j >= len(photos) > i}
            wrong = {(i, j) for i, j in of_altered if i != j and (min(i, j), max(i, j)) not in alone}
            rows.append((weights, name, copy, ALTERED, sum(i == j for i, j in of_altered), len(wrong)))
        table.add([*rows, (weights, name, "alone", len(photos), 0, len(alone))])


def saved(image: Image.Image, rng: random.Random) -> Image.Image:
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=rng.randint(60, 95))
    return Image.open(file)


def cropped(image: Image.Image, rng: random.Random, side: float) -> Image.Image:
    w, h = image.size
    left, top = (rng.uniform(0, 1 - side) * length for length in (w, h))
    return image.crop((round(left), round(top), round(left + side * w), round(top + side * h)))


def quarter(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.transpose(rng.choice(QUARTERS))


def turned(image: Image.Image, rng: random.Random, degrees: float) -> Image.Image:
    """The largest part in the middle with the same shape that shows nothing outside the image."""
    (w, h) = image.size
    angle = math.radians(degrees)
    left, top = ((1 - 1 / (math.cos(angle) + math.sin(angle) * max(w / h, h / w))) * length / 2 for length in (w, h))
    whole = image.rotate(rng.choice((-degrees, degrees)), Image.Resampling.BICUBIC)
    return whole.crop((round(left), round(top), round(w - left), round(h - top)))


def framed(image: Image.Image, rng: random.Random, share: float) -> Image.Image:
    return ImageOps.expand(image, round(share * max(image.size)), rng.choice(COLORS))


def on_canvas(image: Image.Image, rng: random.Random) -> Image.Image:
    w, h = image.size
    canvas = Image.new("RGB", (round(1.4 * w), round(1.4 * h)), rng.choice(COLORS))
    canvas.paste(image, (round(rng.uniform(0, 0.4) * w), round(rng.uniform(0, 0.4) * h)))
    return canvas


def with_caption(image: Image.Image, rng: random.Random) -> Image.Image:
    """A white bar with black text below."""
    w, h = image.size
    page = Image.new("RGB", (w, round(1.2 * h)), "white")
    page.paste(image)
    ImageDraw.Draw(page).text((0.05 * w, 1.03 * h), "what one sees here", "black", font_size=0.12 * h)
    return page


def covered(image: Image.Image, rng: random.Random) -> Image.Image:
    """Without a grey square of 30 % of its area."""
    image = image.copy()
    w, h = image.size
    side = 0.3**0.5
    image.paste("gray", tuple(round(length * side) for length in (0, 0, w, h)))
    return image


def seen_from_aside(image: Image.Image, rng: random.Random) -> Image.Image:
    """Its left side is 30 % longer than its right one."""
    w, h = image.size
    corners = (0, 0.15 * h, 0, 0.85 * h, w, h, w, 0)
    return image.transform(image.size, Image.Transform.QUAD, corners, Image.Resampling.BICUBIC)


def lighter(image: Image.Image, rng: random.Random) -> Image.Image:
    gamma = rng.choice((0.5, 2.0))
    return image.point([round(255 * (i / 255) ** gamma) for i in range(256)] * 3)


def grey(image: Image.Image, rng: random.Random) -> Image.Image:
    return ImageEnhance.Color(image).enhance(0)


def small(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.resize([max(48, length // 2) for length in image.size])


def blurred(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 100))


WAYS: dict[str, Callable[[Image.Image, random.Random], Image.Image]] = {
    "half as large": small,
    "blurred a little": blurred,
    "in grey": grey,
    "gamma 0.5 or 2": lighter,
    "as of a burst": variant,
    "mirrored": lambda image, rng: ImageOps.mirror(image),
    "upside down, mirrored": lambda image, rng: ImageOps.flip(image),
    "turned by 90, 180 or 270 degrees": quarter,
    "turned, and as of a burst": lambda image, rng: variant(quarter(image, rng), rng),
    "turned, and cropped to 80 %": lambda image, rng: cropped(quarter(image, rng), rng, 0.8),
    **{f"turned by {degrees} degrees": partial(turned, degrees=degrees) for degrees in (5, 10, 15, 20)},
    **{f"cropped to {share} % of its sides": partial(cropped, side=share / 100) for share in (90, 80, 70, 60)},
    "in a frame of 6 %": partial(framed, share=0.06),
    "in a frame of 15 %": partial(framed, share=0.15),
    "on a larger canvas": on_canvas,
    "with a caption below": with_caption,
    "30 % of it covered": covered,
    "seen at an angle": seen_from_aside,
}

if __name__ == "__main__":
    typer.run(main)
