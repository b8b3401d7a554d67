"""From a file, or an image in memory, to its pixels: exactly the transform's, with PIL and NumPy alone."""

import math
import struct
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from functools import cache, partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, TypeVar
from zlib import crc32

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from dcp_zoo.errors import UnreadableImages, ZooError, as_zoo_error, attempted
from dcp_zoo.fields import Values
from dcp_zoo.files import MAX_PIXELS, check_regular
from dcp_zoo.threads import available_cores

if TYPE_CHECKING:
    import numpy as np  # slow to import

HEIF_BRANDS = (b"he", b"mif1", b"msf1")  # bytes 8 to 12 of a file begin with one of these
LONGEST = 100  # side, in units of the other: the shorter one is enlarged to the input size, and this one with it
# last bytes of a complete file; a WebP that is not complete cannot be opened
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "WEBP": b""}
ImageLike = Any  # see `FORMS`
FORMS = (
    "an image is a path, PIL's, an open file, its bytes, datasets' dict of bytes and path, or an array or tensor "
    "(H, W), (H, W, 3), (H, W, 4) or (3, H, W) of uint8 or of floats 0 to 1"
)
GREY = 32  # pixels of both sides of a grey copy
NUMBERS = 2 * GREY**2 + 3  # of `Facts`
FRAME = 32  # grey levels: where a whole row or column differs less, beside the picture, it is a frame
AHEAD = 64  # images that are decoded while others are computed
SIDE = 160  # pixels of a thumbnail's longer side
S = TypeVar("S")
T = TypeVar("T")


class UnsupportedImage(UnreadableImages):
    """A file in a format that cannot be read, or that is not allowed."""


@cache
def picture_formats() -> tuple[str, ...]:
    """PIL's formats that are read: none for which it runs other programs, as for EPS; HEIC if its
    plugin is there."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    Image.init()  # imports every plugin
    names = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    return tuple(name for name in names if name in Image.OPEN)


def load_image(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image, by its path or in memory, as RGB, rotated by its EXIF orientation, transparency dropped
    as in PIL's `convert`. An animation gives its first frame. ZooError, naming the path, for what is
    missing, damaged, no regular file, not in one of `picture_formats`, or larger than `max_pixels`,
    which is checked before anything is decoded.

    Args:
        image: a path; PIL's; an open file, or its bytes; a dict of bytes and path, as datasets'
            `Image(decode=False)` gives; an array or tensor (H, W), (H, W, 3), (H, W, 4) or (3, H, W) of
            uint8 or of floats 0 to 1.
        max_pixels: of files and bytes.
    """
    with _opened(image, max_pixels) as opened:
        return _rgb(opened)


def to_image(image: ImageLike) -> str | bytes | Mapping[str, Any] | Image.Image:
    """An image of `load_image` as a path, bytes, a dict of bytes and path, or PIL's; ZooError for anything
    else, and one in place of an image."""
    if isinstance(image, ZooError):
        raise UnreadableImages(str(image))
    if image is None or (isinstance(image, float) and math.isnan(image)):
        raise UnreadableImages("there is no image (None or NaN)")
    if isinstance(image, Mapping) and {"bytes", "path"} <= image.keys():
        if image["bytes"] is not None:
            return image
        image = image["path"]
    if isinstance(image, Path):
        return str(image)
    if isinstance(image, (str, bytes, Image.Image)):
        return image
    if hasattr(image, "read"):
        return {"bytes": image.read(), "path": getattr(image, "name", "file")}
    return _of_array(image)


def _of_array(image: Any) -> Image.Image:
    import numpy as np

    with as_zoo_error(f"{type(image).__name__} is not an image: {FORMS}.", TypeError, ValueError):
        array = image.detach().cpu().numpy() if hasattr(image, "detach") else np.asarray(image)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
    if not is_image or array.size == 0:
        kind = f"An array of shape {array.shape}" if array.ndim else type(image).__name__
        raise ZooError(f"{kind} is not an image: {FORMS}.")
    if array.dtype != np.uint8:
        is_unit = array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1  # of NaN nothing holds
        if not is_unit:  # no range is told: of many images each has another one
            raise ZooError(f"An array of {array.dtype} is not an image, or not of these levels: {FORMS}.")
        array = (array * 255).round().astype(np.uint8)
    return Image.fromarray(array)


def pixels_sha256(image: ImageLike) -> str:
    """A hash of what `load_image` makes of an image: of its size and its RGB pixels, upright."""
    pixels = load_image(image)
    return sha256(f"{pixels.size} ".encode() + pixels.tobytes()).hexdigest()


def file_sha256(path: str) -> str:
    """A hash of the bytes of an image; ZooError, naming it, if they cannot be read."""
    return sha256(_read(path)).hexdigest()


class Facts(NamedTuple):
    """What is known of an image besides its pixels, once it was read."""

    numbers: "np.ndarray"  # its `grey_copies` and when it was `taken_by` a camera, float32 (2051,), which is exact
    sha256: str = ""  # of a file


def load_with_facts(image: ImageLike) -> tuple[Image.Image, Facts]:
    """`load_image`, and what else there is to know: a file is read once for all."""
    import numpy as np

    image = to_image(image)
    hashed = ""
    if isinstance(image, str):
        image = {"bytes": _read(image), "path": image}
        hashed = sha256(image["bytes"]).hexdigest()
    with _opened(image) as file:
        taken = taken_by(file)
        pixels = _rgb(file)
    numbers = np.concatenate([grey_copies(pixels).ravel(), taken], dtype=np.float32)
    return pixels, Facts(numbers, hashed)


def grey_copies(image: Image.Image) -> "np.ndarray":
    """An image in grey, as a whole and without a frame of one colour, each squeezed into a small
    square, uint8 (2, 32, 32): enough to find the same picture. Of a smaller image both are flat, like
    no other: with so few pixels, different images of a class are as alike as copies."""
    import numpy as np

    if min(image.size) < GREY:
        return np.full((2, GREY, GREY), 128, np.uint8)
    whole = image.convert("L")
    picture = np.asarray(whole)
    for _ in range(4):  # each side is at the top once
        frame = next((i for i, row in enumerate(picture) if np.ptp(row) > FRAME), 0)
        picture = np.rot90(picture[frame:])
    is_framed = picture.size < whole.width * whole.height and min(picture.shape) >= GREY
    unframed = Image.fromarray(picture) if is_framed else whole
    return np.stack([np.asarray(grey.resize((GREY, GREY), reducing_gap=2.0)) for grey in (whole, unframed)])


def taken_by(image: Image.Image) -> tuple[int, int, int]:
    """Which camera took a photograph, as a number, and on which day and at which second of it; zeros
    unless its EXIF says all. The numbers are small enough for float32."""
    exif = image.getexif()
    details = exif.get_ifd(ExifTags.IFD.Exif)
    model = exif.get(ExifTags.Base.Model)
    try:
        moment = datetime.strptime(str(details.get(ExifTags.Base.DateTimeOriginal)), "%Y:%m:%d %H:%M:%S")
    except ValueError:
        model = None
    if not model:
        return 0, 0, 0
    camera = f"{exif.get(ExifTags.Base.Make)} {model} {details.get(ExifTags.Base.BodySerialNumber)}"
    number = 1 + crc32(camera.encode()) % 2**23
    return number, moment.toordinal(), 3600 * moment.hour + 60 * moment.minute + moment.second


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, in 8 bits per channel. The image itself is turned: a copy of a large one is hundreds of
    megabytes."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _grey(image)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits or of 0 to 1 in 8 bits, to which PIL would clip them; ZooError if white is
    unknown."""
    import numpy as np

    levels = np.asarray(image)
    low = levels.min()
    high = levels.max()
    if image.mode == "F":
        white = 1
    elif image.mode == "I" and high <= 255:
        white = 255
    else:
        white = 65535
    if not 0 <= low <= high <= white:  # of NaN nothing holds
        raise ZooError(f"its grey levels go from {low:g} to {high:g}, not from 0 to {white}: save it in 8 bits")
    scaled = levels * np.float32(255 / white)
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))


def in_threads(read: Callable[[S], T], images: Iterable[S]) -> Iterator[T]:
    """What `read` returns for each image, in order. Threads on all cores read ahead of the caller: PIL works
    outside the interpreter lock."""
    pool = ThreadPoolExecutor(available_cores())
    waiting = deque[Future[T]]()
    try:
        for image in images:
            waiting.append(pool.submit(read, image))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(
    read: Callable[[S], T], images: Sequence[S], size: int
) -> Iterator[tuple[Sequence[S], list[T | ZooError]]]:
    """Batches of images, and what `read` returns for each, or the error of one that cannot be read."""
    results = in_threads(partial(attempted, read), images)
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        yield batch, [next(results) for _ in batch]


def thumbnails(images: Iterable[ImageLike], side: int = SIDE) -> list[str]:
    """Images, shrunk to at most `side` pixels wide and high, as JPEGs in base64."""

    def small(image: ImageLike) -> str:
        pixels = load_image(image)
        buffer = BytesIO()
        pixels.thumbnail((side, side))
        pixels.save(buffer, "JPEG")
        return b64encode(buffer.getvalue()).decode()

    return list(in_threads(small, images))


def check_complete(image: ImageLike) -> None:
    """ZooError if not an image, or truncated: of a file JPEG, PNG and WebP by header and last bytes, the
    rest is decoded."""
    if not isinstance(image, str):
        load_image(image)
        return
    with _opened(image) as opened:
        file: Any = opened.fp
        position = file.tell()
        file.seek(max(0, file.seek(0, 2) - 4096))
        last = file.read().rstrip(b"\0")  # which some cameras append
        file.seek(position)
        end = ENDS.get(opened.format)
        if end is None or not last.endswith(end):
            opened.load()


@contextmanager
def _opened(image: ImageLike, max_pixels: int = MAX_PIXELS) -> Iterator[Any]:
    """PIL's image of what `load_image` takes, of a file or bytes not yet decoded; any error inside is
    `_explained`."""
    image = to_image(image)
    if isinstance(image, Image.Image):
        with _explained(getattr(image, "filename", "") or "in memory"):
            yield image.copy()  # as it is turned
        return
    name = image if isinstance(image, str) else "bytes"
    if isinstance(image, Mapping):
        name = image["path"] or name
        image = image["bytes"]
    with _explained(name), _stream(image) as stream, _identified(stream) as opened:
        if opened.width * opened.height > max_pixels:
            raise ValueError(f"{opened.width} x {opened.height} pixels, more than the limit of {max_pixels:,}")
        if max(opened.size) > LONGEST * min(opened.size):
            raise ValueError(f"{opened.width} x {opened.height} pixels, one side over {LONGEST} times the other")
        yield opened


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Any error inside becomes a ZooError."""
    try:
        yield
    except Exception as error:  # decoders raise almost any exception for damaged files
        kind = UnsupportedImage if isinstance(error, UnidentifiedImageError) else UnreadableImages
        reason = str(error) or type(error).__name__
        if isinstance(error, FileNotFoundError):  # or the file that a link leads to
            reason = "there is no such file"
            error = OSError(reason)
        text = f"Cannot read the image {path}: {reason}. Replace the file, or leave it out."
        raise kind(text, {path: reason}) from error


def _identified(stream: IO[bytes]) -> ImageFile.ImageFile:
    """The image in a stream, not yet decoded: as `Image.open`, whose limit of pixels holds for the
    whole process."""
    start = stream.read(16)
    for name in picture_formats():
        make, accept = Image.OPEN[name]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # it is in another format
            accepted = accept is None or accept(start)
            if accepted and not isinstance(accepted, str):  # a text says why PIL does not read it
                stream.seek(0)
                return make(stream, "")
    if start[4:8] == b"ftyp" and start.startswith(HEIF_BRANDS, 8):  # phones also call such files .jpg
        raise UnidentifiedImageError("PIL cannot read HEIC without a plugin (pip install pillow-heif)")
    raise UnidentifiedImageError(f"not in a supported format ({', '.join(picture_formats())})")


def _stream(image: str | bytes) -> IO[bytes]:
    """What is in a file, by its path, or these bytes."""
    if isinstance(image, bytes):
        return BytesIO(image)
    check_regular(image)
    return Path(image).open("rb")


def _read(path: str) -> bytes:
    with _explained(path), _stream(path) as stream:
        return stream.read()


def crop(image: Image.Image, cfg: Values) -> "np.ndarray":
    """An RGB image -> its pixels, uint8 (3, H, W), before they are normalised: exactly those of timm's
    transform for testing. Of timm's `cfg`, interpolation ("bicubic") and crop_mode ("center", or
    "squash" both sides) may be missing.
    """
    import numpy as np

    _, height, width = cfg["input_size"]
    resized = int(height / cfg["crop_pct"])
    if cfg.get("crop_mode") == "squash":
        size = [int(width / cfg["crop_pct"]), resized]
    else:
        short = min(image.size)
        size = [resized if side == short else int(resized * side / short) for side in image.size]
    image = image.resize(size, Image.Resampling[cfg.get("interpolation", "bicubic").upper()])
    left = round((size[0] - width) / 2)
    top = round((size[1] - height) / 2)
    return np.asarray(image.crop((left, top, left + width, top + height))).transpose(2, 0, 1)


def normalise(pixels: "np.ndarray", cfg: Values) -> "np.ndarray":
    """uint8 (..., 3, H, W) -> float32 of the same shape, with timm's mean and std."""
    import numpy as np

    mean = np.asarray(cfg["mean"], np.float32)[:, None, None]
    std = np.asarray(cfg["std"], np.float32)[:, None, None]
    x = pixels.astype(np.float32, order="C")
    x /= 255
    x -= mean
    x /= std
    return x
