"""Videos as images: the frame at a time is at the path `VIDEO#t=SECONDS`, and a video as a whole at `VIDEO#t=`."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from threading import local
from typing import Any

from PIL import Image

from dcp_zoo.data.paths import VIDEO_SUFFIXES
from dcp_zoo.errors import ZooError, as_zoo_error, import_extra
from dcp_zoo.files import MAX_FRAME_PIXELS, check_regular

FORWARD = 5.0  # seconds up to which the frames in between are decoded: from farther, a key frame is mostly nearer
LOCAL = {"protocol_whitelist": "file"}  # playlists may name other places
LIMIT = {"max_pixels": str(MAX_FRAME_PIXELS)}
_last = local()  # the video that this thread has open, for its next frame


def is_video(path: str) -> bool:
    """Whether a file is a video, by its name."""
    return path.lower().endswith(VIDEO_SUFFIXES)


def is_frame(path: str) -> bool:
    """Whether a path or a name is that of a frame, or a path that of a video as a whole."""
    video, _, seconds = path.rpartition("#t=")
    return is_video(video) and set(seconds) <= set("0123456789.e+")  # not a photograph such as a.mp4#t=1.png


def frames_of(video: str, fps: float) -> Iterator[str]:
    """The paths of its frames at a rate; none if the video cannot be read to its end."""
    try:
        end = _opened(video).end
    except ZooError:
        return
    finally:
        _close()
    yield from (f"{video}#t={number / fps:.6g}" for number in range(math.floor(end * fps) + 1))


def read_frame(path: str) -> Image.Image:
    """The frame at a path, upright; of a video as a whole the one in the middle. ZooError if it cannot be decoded."""
    video, _, seconds = path.rpartition("#t=")
    opened = _opened(video)
    with _reading(path):
        frame = opened.at(float(seconds) if seconds else opened.end / 2)
    if not seconds:  # the video as a whole follows its frames
        _close()
    return frame


def _opened(video: str) -> "_Video":
    if getattr(_last, "name", None) != video:
        av = import_extra("av", "video")
        _close()
        with _reading(video), ExitStack() as failed:
            check_regular(video)
            container = failed.enter_context(av.open(video, options=LOCAL | LIMIT))
            _last.name, _last.video = video, _Video(container)
            failed.pop_all()  # it stays open
    return _last.video


def _close() -> None:
    _last.name = _last.video = None


def _reading(path: str) -> AbstractContextManager[None]:
    message = f"Cannot read the video {path}: {{}}. Replace the file, or leave it out."
    return as_zoo_error(message, Exception)  # decoders raise almost any exception for damaged files


class _Video:
    """A video, read forwards where that is possible; times are in seconds from the first frame, `end` is the last's."""

    def __init__(self, container: Any) -> None:
        self.container = container
        if not container.streams.video:
            raise ValueError("it has no pictures")
        self.stream = container.streams.video[0]
        if not 0 < self.stream.width * self.stream.height <= MAX_FRAME_PIXELS:  # 0 for those beyond the limit
            raise ValueError(f"its frames have no size, or more than the limit of {MAX_FRAME_PIXELS:,} pixels")
        self.stream.codec_context.options = LIMIT  # the size may change from frame to frame
        self.start = float((self.stream.start_time or 0) * self.stream.time_base)
        self.now = math.inf
        if self.stream.duration:
            length = float(self.stream.duration * self.stream.time_base)
        elif container.duration:
            length = container.duration / 1e6
        else:  # what browsers record says nothing
            times = (packet.pts for packet in container.demux(self.stream) if packet.pts is not None)
            length = float(max(times) * self.stream.time_base) - self.start
        try:
            self.at(length)
        except PermissionError as error:  # FFmpeg's for a place behind what is there
            raise ValueError("its end is missing") from error
        self.end = self.now
        if self.end < 0.9 * length - 1:
            raise ValueError(f"it ends after {self.end:.0f} of {length:.0f} seconds")

    def __del__(self) -> None:
        self.container.close()  # which refers to itself, so that it would stay open for long

    def at(self, seconds: float) -> Image.Image:
        """The first frame from this time on, or the last one."""
        if not 0 <= seconds - self.now <= FORWARD:
            offset = int((self.start + seconds) / self.stream.time_base)
            self.container.seek(offset, stream=self.stream)
            self.frames, self.now = self.container.decode(self.stream), -math.inf
        try:
            while self.now < seconds:
                self.frame = next(self.frames)
                self.now = self.frame.time - self.start
        except StopIteration:
            if self.now < 0:
                raise ValueError("it has no frames") from None
        except Exception:
            self.now = math.inf  # the decoder has stopped: seek
            raise
        return self.frame.to_image().rotate(self.frame.rotation, expand=True)
