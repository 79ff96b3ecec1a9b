"""Limits of what Pillow reads of an image's metadata: TIFF and EXIF tags, chunks of PNGs, segments of JPEGs."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from PIL import ImageFile, JpegImagePlugin, TiffImagePlugin
from PIL.PngImagePlugin import PngStream

PNG_TEXT, PNG_METADATA = ("tEXt", "zTXt", "iTXt"), ("iCCP", "eXIf", "gAMA", "cHRM", "sRGB", "pHYs")  # kinds of chunks
MAX_CHUNK, MAX_TEXT = 1 << 20, 8 << 20  # size limits of such a chunk, in bytes, and of all text, in characters
MAX_SEGMENTS = 10_000  # maximum number of segments of metadata in a JPEG, all of which Pillow keeps


def limit_metadata() -> None:
    """Replace Pillow's readers of metadata by ones that ignore or refuse what is broken or too large."""
    tags = TiffImagePlugin.ImageFileDirectory_v2
    tags.load = _bound_tags(tags.load)  # pyright: ignore[reportAttributeAccessIssue]
    for kind in PNG_TEXT + PNG_METADATA:
        setattr(PngStream, f"chunk_{kind}", _ignore_errors(kind, getattr(PngStream, f"chunk_{kind}")))
    kept = (JpegImagePlugin.APP, JpegImagePlugin.COM)
    JpegImagePlugin.MARKER |= {
        marker: (name, about, _bound_segments(read) if read in kept else read)
        for marker, (name, about, read) in JpegImagePlugin.MARKER.items()
    }


def _bound_tags(load: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """Wrap Pillow's reader of TIFF and EXIF tags so that it reads a limited number of bytes.

    It reads the data of every tag, and thousands of tags may refer to the same megabyte.
    """

    class Bounded:
        def __init__(self, file: Any):
            self.file, self.seek, self.tell = file, file.seek, file.tell
            at = file.tell()
            file.seek(0, os.SEEK_END)
            self.left = file.tell() + (1 << 16)
            file.seek(at)

        def read(self, size: int = -1) -> bytes:
            content = self.file.read(size)
            self.left -= len(content)
            if self.left < 0:
                raise ValueError("its tags refer to the same bytes again and again")
            return content

    return lambda directory, file: load(directory, Bounded(file))


def _ignore_errors(kind: str, read: Callable[[Any, int, int], bytes]) -> Callable[[Any, int, int], bytes]:
    """Wrap Pillow's reader of a kind of PNG chunk so that it ignores what it cannot read or what is too large."""

    def read_or_skip(stream: Any, position: int, length: int) -> bytes:
        if length <= MAX_CHUNK and (kind not in PNG_TEXT or stream.text_memory < MAX_TEXT):
            try:
                return read(stream, position, length)
            except (ValueError, SyntaxError, IndexError, struct.error):
                stream.fp.seek(position)
        return ImageFile._safe_read(stream.fp, length)

    return read_or_skip


def _bound_segments(read: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
    """Wrap Pillow's reader of a JPEG's metadata that ignores a segment that is too short and refuses too many."""

    def read_or_skip(image: Any, marker: int) -> None:
        if len(image.applist) >= MAX_SEGMENTS:
            raise ValueError(f"it has more than {MAX_SEGMENTS:,} segments of metadata; save it again")
        with suppress(struct.error):
            read(image, marker)

    return read_or_skip
