"""What images of every kind of level, transparency and colour profile become in 8-bit RGB."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_noise
from PIL import Image, ImageCms

from captioning import pixels
from captioning.errors import InputError
from captioning.image_files import read_image

# Levels


GREY = np.tile(np.arange(256, dtype=np.uint8), (16, 1))
SPOILT = GREY.astype(np.float32) / 255
SPOILT[3, 3] = np.nan
LEVELS = {  # what a file holds, and what is read, 0 to 255
    "int32 of 0 to 255": (GREY.astype(np.int32), GREY),
    "int32 of 16 bits": (GREY.astype(np.int32) * 257, GREY),
    "int32 of 24 bits": (GREY.astype(np.int32) * 65793, GREY),
    "int32, signed": ((GREY.astype(np.int32) - 128) * 8, GREY),
    "int32, a mask": ((GREY > 127).astype(np.int32), (GREY > 127) * 255),
    "uint16 of 8 bits": (GREY.astype(np.uint16), GREY),
    "uint16 of 12 bits": (GREY.astype(np.uint16) * 16, GREY / 255 * 4080 / 4095 * 255),
    "uint16 of 12 bits with a mark for no data": (
        np.where(np.isnan(SPOILT), 65535, GREY.astype(np.uint16) * 16).astype(np.uint16),
        np.where(np.isnan(SPOILT), 255, GREY / 255 * 4080 / 4095 * 255),
    ),
    "uint16": (GREY.astype(np.uint16) * 257, GREY),
    "float of 0 to 1": (GREY.astype(np.float32) / 255, GREY),
    "float of 0 to 0.5": (GREY.astype(np.float32) / 510, GREY / 2),
    "float of 0 to 255": (GREY.astype(np.float32), GREY),
    "float of -1 to 1": (GREY.astype(np.float32) / 127.5 - 1, GREY),
    "float with a NaN": (SPOILT, np.nan_to_num(SPOILT) * 255),
    "float with infinities": (
        np.where(np.isnan(SPOILT), np.inf, SPOILT).astype(np.float32),
        np.nan_to_num(SPOILT) * 255,
    ),
    "float with a mark for no data": (
        np.where(np.isnan(SPOILT), -3.4e38, SPOILT).astype(np.float32),
        np.nan_to_num(SPOILT) * 255,
    ),
    "float of 0 to 1 with a spark": (
        np.where(np.isnan(SPOILT), 4, SPOILT).astype(np.float32),
        np.where(np.isnan(SPOILT), 1, SPOILT) * 255,
    ),
    **{
        f"float of 0 to 1 with a highlight of {level:g}": (
            np.where(np.isnan(SPOILT), level, SPOILT).astype(np.float32),
            np.where(np.isnan(SPOILT), 1, SPOILT) * 255,
        )
        for level in (100, 1e6)
    },
    "float of 0 to 255 with fractions": (GREY.astype(np.float32) + np.float32(0.25), GREY),
    "float of 0 to 1.2": (GREY.astype(np.float32) / 255 * 1.2, (GREY / 255 * 1.2).clip(0, 1) * 255),
    "float with -9999 for no data": (
        np.where(np.isnan(SPOILT), -9999, SPOILT).astype(np.float32),
        np.nan_to_num(SPOILT) * 255,
    ),
    **{
        f"{np.dtype(kind).name} of 0 to {255 * scale:g} with a level of {level:g}": (
            np.where(np.isnan(SPOILT), level, GREY * float(scale)).astype(kind),
            np.where(np.isnan(SPOILT), shown, GREY),
        )
        for kind, scale, level, shown in (
            (np.int32, 1, -(2**31), 0),
            (np.int32, 1, 2**31 - 1, 255),
            (np.int32, 1, 70000, 255),
            (np.int32, 1, -999, 0),
            (np.float32, 1, -999, 0),
            (np.float32, 1, 1e10, 255),
            (np.float32, 1, -1e10, 0),
            (np.float32, 1 / 255, -5, 0),
            (np.float32, 257, 1e6, 255),
        )
    },
    **{
        f"levels of {low} to {high} with one of {level:g}": (
            np.where(np.isnan(SPOILT), level, low + GREY / 255 * (high - low)).astype(np.float32),
            np.where(np.isnan(SPOILT), shown, GREY),
        )
        for low, high, level, shown in (
            (-1500, 1500, 1e9, 255),
            (-1500, 1500, -1e9, 0),
            (0, 1e6, 1e12, 255),
            (0, 1e6, -1e9, 0),
        )
    },
    "float of 0 to 1, mostly missing, with a highlight": (
        np.where(np.isnan(SPOILT), 20, np.where(np.arange(16)[:, None] > 5, np.nan, SPOILT)).astype(np.float32),
        np.where(np.isnan(SPOILT), 1, np.where(np.arange(16)[:, None] > 5, 0, np.nan_to_num(SPOILT))) * 255,
    ),
    "nothing but zeros": (np.zeros((16, 256), np.int32), np.zeros((16, 256))),
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("band", [1 << 20, 1000], ids=["whole", "in bands"])
def test_levels_keep_their_brightness(name: str, band: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixels, "BAND_PIXELS", band)
    levels, expected = LEVELS[name]
    Image.fromarray(levels).save(tmp_path / "a.tif")
    read = np.asarray(read_image(tmp_path / "a.tif")).astype(float)
    assert np.abs(read - np.asarray(expected, float)[..., None]).max() <= 1


def tiff(levels: np.ndarray, sample_format: int = 1, photometric: int = 1, **options: Any) -> bytes:
    """Encode levels of shape (height, width) or (height, width, 3) as a TIFF of one strip, or of one for each plane."""
    order = ">" if options.get("big_endian") else "<"
    data = levels.astype(levels.dtype.newbyteorder(order))
    channels = levels.shape[2] if levels.ndim == 3 else 1
    strips = [data[..., i].tobytes() for i in range(channels)] if options.get("planes") else [data.tobytes()]
    strips = [zlib.compress(strip) for strip in strips] if options.get("packed") else strips
    height, width = levels.shape[:2]
    tags = {
        256: [width],
        257: [height],
        258: [8 * levels.itemsize] * channels,
        259: [8 if options.get("packed") else 1],
    }
    tags |= {262: [photometric], 273: [0] * len(strips), 277: [channels], 278: [height]}
    tags |= {279: [len(strip) for strip in strips], 284: [1 + len(strips) // 2]}
    tags |= {338: [options["extra_samples"]]} if "extra_samples" in options else {}
    tags |= {**({320: options["palette"]} if "palette" in options else {}), 339: [sample_format] * channels}
    tags |= {42113: [options["no_data"]]} if "no_data" in options else {}
    longs = 8 + 2 + 12 * len(tags) + 4  # where the numbers begin that do not fit into the list of tags
    at = longs + sum(4 * len(numbers) for numbers in tags.values() if len(numbers) > 1)
    for i, strip in enumerate(strips):
        tags[273][i], at = at, at + len(strip)
    entries, further = b"", b""
    for tag, numbers in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}L", *numbers)
        entries += struct.pack(f"{order}HHL", tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(f"{order}L", longs + len(further))
        further += packed if len(numbers) > 1 else b""
    start = b"MM\0*" if options.get("big_endian") else b"II*\0"
    return start + struct.pack(f"{order}LH", 8, len(tags)) + entries + bytes(4) + further + b"".join(strips)


def png(levels: np.ndarray, key: tuple[int, ...] | None = None) -> bytes:
    """Encode levels of 16 bits, (height, width, channels), as a PNG; the colour `key` is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))

    height, width, channels = levels.shape
    header = struct.pack(">LLBBBBB", width, height, 16, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    transparent = b"" if key is None else chunk(b"tRNS", struct.pack(f">{channels}H", *key))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    chunks = chunk(b"IHDR", header) + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


COLOURS = np.asarray(draw_noise(0, (64, 32)).resize((256, 16)))
DEEP = COLOURS.astype(np.uint16) * 257
ALPHA = np.full((16, 256, 1), 65535, np.uint16)
GREY_1 = GREY[..., None].astype(np.uint16)
SPARK = np.isnan(SPOILT)[..., None]
FILES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {  # the content of a file, and what is read
    "a TIFF of 16 bits in planes": (lambda: tiff(DEEP, photometric=2, planes=True), COLOURS),
    "a big-endian TIFF of 16 bits in planes": (lambda: tiff(DEEP, 1, 2, planes=True, big_endian=True), COLOURS),
    "a packed TIFF of 16 bits in planes": (lambda: tiff(DEEP, 1, 2, planes=True, packed=True), COLOURS),
    "a TIFF of 8 bits in planes": (lambda: tiff(COLOURS, photometric=2, planes=True), COLOURS),
    "a TIFF of 10 of 16 bits": (lambda: tiff(DEEP >> 6, photometric=2), COLOURS),
    "a big-endian TIFF of 12 of 16 bits": (lambda: tiff(DEEP >> 4, 1, 2, big_endian=True), COLOURS),
    "a packed TIFF of 12 of 16 bits": (lambda: tiff(DEEP >> 4, 1, 2, packed=True), COLOURS),
    "a PNG of 16 bits": (lambda: png(DEEP), COLOURS),
    "a PNG of 8 of 16 bits": (lambda: png(DEEP >> 8), COLOURS),
    "a PNG of 10 of 16 bits": (lambda: png(DEEP >> 6), COLOURS),
    "a PNG of 12 of 16 bits": (lambda: png(DEEP >> 4), COLOURS),
    "a PNG of 12 of 16 bits with a highlight": (
        lambda: png(np.where(SPARK, 40000, DEEP >> 4)),
        np.where(SPARK, 255, COLOURS),
    ),
    "a TIFF of 16 bits, dark but for a corner": (
        lambda: tiff(np.where(GREY_1 < 2, DEEP, DEEP >> 5), photometric=2),
        np.where(GREY_1 < 2, COLOURS, (DEEP >> 5) / 257),
    ),
    "a PNG of 12 of 16 bits and alpha of 16": (lambda: png(np.dstack([DEEP >> 4, ALPHA])), COLOURS),
    "a PNG of 12 of 16 bits and alpha of 12": (lambda: png(np.dstack([DEEP, ALPHA]) >> 4), COLOURS),
    "a grey PNG of 12 of 16 bits and alpha": (lambda: png(np.dstack([GREY_1 << 4, ALPHA])), GREY),
    "a black drawing on nothing": (lambda: png(np.dstack([0 * DEEP, ALPHA * (GREY_1 < 128)])), (GREY > 127) * 255),
    "a grey PNG with a transparent level": (lambda: png(GREY_1 * 257, (0,)), np.where(GREY, GREY, 255)),
    "a PNG of 16 bits with a transparent colour": (
        lambda: png(np.where(GREY_1 > 9, DEEP, 0xC810), (0xC810,) * 3),
        np.where(GREY_1 > 9, COLOURS, 255),
    ),
    "a PNG of 12 of 16 bits with a transparent colour": (
        lambda: png(np.where(GREY_1 > 9, DEEP >> 4, 4095), (4095,) * 3),
        np.where(GREY_1 > 9, COLOURS, 255),
    ),
    "uint32": (lambda: tiff(GREY.astype(np.uint32) << 24), GREY),
    "uint32 of 16 bits": (lambda: tiff(GREY.astype(np.uint32) * 257), GREY),
    "int16": (lambda: tiff(GREY.astype(np.int16) * 128, 2), GREY),
    "int16, signed": (lambda: tiff(GREY.astype(np.int16) * 256 - 32767, 2), GREY),
    "int16 of 12 bits": (lambda: tiff(GREY.astype(np.int16) * 16, 2), GREY),
    "int8": (lambda: tiff((GREY // 2).astype(np.int8), 2), GREY),
    "int8, signed": (lambda: tiff((GREY - 128.0).astype(np.int8), 2), GREY),
    "uint16 of 10 bits": (lambda: tiff(GREY.astype(np.uint16) * 4), GREY),
    "float whose 0 is white": (lambda: tiff(1 - GREY.astype(np.float32) / 255, 3, 0), GREY),
    "packed big-endian float": (lambda: tiff(GREY.astype(np.float32) / 255, 3, big_endian=True, packed=True), GREY),
    "packed big-endian int32": (lambda: tiff(GREY.astype(np.int32) * 257, 2, big_endian=True, packed=True), GREY),
    "packed big-endian int16": (lambda: tiff(GREY.astype(np.int16) * 128, 2, big_endian=True, packed=True), GREY),
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_more_than_8_bits_keep_their_colours(name: str, tmp_path: Path):
    content, expected = FILES[name]
    (tmp_path / "a").write_bytes(content())
    expected = expected if expected.ndim == 3 else expected[..., None]
    read = read_image(tmp_path / "a")
    assert np.abs(np.asarray(read).astype(int) - expected).max() <= 2
    with Image.open(tmp_path / "a") as opened:
        for _ in range(2):  # it stays as it is
            assert read_image(opened) == read


def test_a_pil_image_whose_file_is_closed_is_one_sentence(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(png(DEEP))
    with Image.open(tmp_path / "a.png") as image:
        pass
    with pytest.raises(InputError, match=r"its file is closed; load\(\) it before that, or name its path"):
        read_image(image)


def tga(colours: np.ndarray) -> bytes:
    """Encode colours as a TGA of 32 bits whose header states no bits of transparency."""
    height, width = colours.shape[:2]
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, 32, 0x20)
    return header + np.dstack([colours[..., ::-1], np.zeros_like(colours[..., :1])]).tobytes()


def ico(colours: np.ndarray) -> bytes:
    """Encode colours as an icon of 32 bits, of which the fourth byte is unused, and an opaque mask."""
    height, width = colours.shape[:2]
    rows = np.dstack([colours[..., ::-1], np.zeros_like(colours[..., :1])])[::-1].tobytes()
    bitmap = struct.pack("<LLLHHLLLLLL", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0) + rows + bytes(width * height)
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHLL", width, height, 0, 0, 1, 32, len(bitmap), 22) + bitmap


def bmp(colours: np.ndarray) -> bytes:
    """Encode colours as a BMP that has masks for four channels, the fourth of which is unused."""
    height, width = colours.shape[:2]
    rows = np.dstack([colours[..., ::-1], np.zeros_like(colours[..., :1])])[::-1].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    info = (
        struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(rows), 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
    )
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(rows), 0, 0, 14 + len(info)) + info + rows


def psd(colours: np.ndarray) -> bytes:
    """Encode colours as a PSD without layers and with a saved selection, the fourth channel."""
    height, width = colours.shape[:2]
    header = b"8BPS" + struct.pack(">H6xHLLHH", 1, 4, height, width, 8, 3) + bytes(4 + 4 + 4 + 2)
    return header + colours.transpose(2, 0, 1).tobytes() + bytes(width * height)


def psd_bitmap(black: np.ndarray, packed: bool) -> bytes:
    """Encode where an image is black as a PSD of one bit per pixel, whose rows can be packed."""
    height, width = black.shape
    rows = [row.tobytes() for row in np.packbits(black, axis=1)]
    header = b"8BPS" + struct.pack(">H6xHLLHH", 1, 1, height, width, 1, 0) + bytes(4 + 4 + 4)
    if not packed:
        return header + b"\0\0" + b"".join(rows)
    rows = [bytes([len(row) - 1]) + row for row in rows]  # one run of literal bytes
    return header + b"\0\1" + struct.pack(f">{height}H", *map(len, rows)) + b"".join(rows)


def few_greys(bits: int) -> bytes:
    """Encode `GREY` as a PNG of 2 or 4 bits, whose level 1 is transparent."""
    packed = np.packbits(np.unpackbits((GREY >> (8 - bits))[..., None], axis=2)[..., 8 - bits :], axis=None)
    rows = b"".join(b"\0" + row.tobytes() for row in packed.reshape(16, -1))
    header = struct.pack(">LLBBBBB", 256, 16, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"tRNS", struct.pack(">H", 1)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed_chunks = [
        struct.pack(">L", len(x)) + kind + x + struct.pack(">L", zlib.crc32(kind + x)) for kind, x in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed_chunks)


def few_greys_over_white(bits: int) -> np.ndarray:
    levels = GREY >> (8 - bits)
    return np.where(levels == 1, 255, levels * (255 // (2**bits - 1)))[..., None]


PALETTE = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2], 1)
BLACK = GREY < 100
SMALL = np.asarray(draw_noise(1, (32, 32)))
UNUSUAL: dict[str, tuple[bytes, np.ndarray]] = {  # the content of a file, and what is read
    "a TGA without transparency": (tga(COLOURS), COLOURS),
    "an icon without transparency": (ico(SMALL), SMALL),
    "a BMP without transparency": (bmp(COLOURS), COLOURS),
    "a PSD with a selection": (psd(COLOURS), COLOURS),
    "a PSD of one bit": (psd_bitmap(BLACK, False), np.where(BLACK, 0, 255)[..., None]),
    "a packed PSD of one bit": (psd_bitmap(BLACK, True), np.where(BLACK, 0, 255)[..., None]),
    "a PNG of 2 bits with a transparent level": (few_greys(2), few_greys_over_white(2)),
    "a PNG of 4 bits with a transparent level": (few_greys(4), few_greys_over_white(4)),
    "a TIFF with a palette of 8 bits": (tiff(GREY, 1, 3, palette=PALETTE.T.ravel().tolist()), PALETTE[GREY]),
    "a dark PGM": (b"P5 256 16 65535\n" + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes(), GREY[..., None] / 16),
    "a PGM of 12 bits": (
        b"P5 256 16 4095\n" + (GREY.astype(np.uint16) * 16).astype(">u2").tobytes(),
        GREY[..., None] * (4080 / 4095),
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_a_file_says_of_its_levels_counts(name: str, tmp_path: Path):
    content, expected = UNUSUAL[name]
    (tmp_path / "a").write_bytes(content)
    assert np.abs(np.asarray(read_image(tmp_path / "a")).astype(int) - expected).max() <= 1
    with Image.open(tmp_path / "a") as opened:
        assert np.abs(np.asarray(read_image(opened)).astype(int) - expected).max() <= 1
        if opened.mode == "RGBA":
            opened.load()
            assert np.abs(np.asarray(read_image(opened)).astype(int) - expected).max() <= 1


def test_a_dark_file_whose_lower_bytes_are_not_to_be_had_is_refused(tmp_path: Path):
    (tmp_path / "a.tif").write_bytes(tiff(DEEP >> 4, photometric=2, planes=True))
    with pytest.raises(InputError, match=r"a\.tif .*fewer than 13 of their 16 bits; save it with 8 bits"):
        read_image(tmp_path / "a.tif")


def test_the_lowest_and_the_highest_level_are_those_of_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pixels, "SAMPLE", 256)
    monkeypatch.setattr(pixels, "BAND_PIXELS", 512)
    levels = np.where(np.arange(256) % 128, 1500.0, -500.0).astype(np.float32)[None].repeat(64, 0)
    levels[:, 1::2] = 500
    Image.fromarray(levels).save(tmp_path / "a.tif")
    shown = np.asarray(read_image(tmp_path / "a.tif"))[..., 0].astype(int)
    assert np.abs(shown - (levels + 500) * 255 / 2000).max() <= 1


@pytest.mark.parametrize("mark", [65536, 99999])
def test_a_mark_that_no_level_can_have_is_ignored(tmp_path: Path, mark: int):
    (tmp_path / "a.tif").write_bytes(tiff(DEEP, photometric=2, no_data=mark))
    assert np.abs(np.asarray(read_image(tmp_path / "a.tif")).astype(int) - COLOURS).max() <= 2


def test_the_mark_of_missing_cells_is_none_of_transparency(tmp_path: Path):
    content = tiff(np.dstack([DEEP >> 4, ALPHA]), photometric=2, extra_samples=2, no_data=65535)
    (tmp_path / "a.tif").write_bytes(content)
    assert np.abs(np.asarray(read_image(tmp_path / "a.tif")).astype(int) - COLOURS).max() <= 2


def test_the_mark_of_missing_cells_in_a_colour_tiff(tmp_path: Path):
    levels = DEEP >> 4
    levels[:6] = 65535
    content = tiff(levels, photometric=2, no_data=65535)
    (tmp_path / "a.tif").write_bytes(content)
    shown = np.asarray(read_image(tmp_path / "a.tif")).astype(int)
    assert (shown[:6] == 0).all()
    assert np.abs(shown[6:] - COLOURS[6:].astype(int)).max() <= 2


def sgi(levels: np.ndarray, packed: bool = False) -> bytes:
    """Encode grey levels of 16 bits as an SGI file; if `packed`, its rows are run-length encoded."""
    height, width = levels.shape
    header = struct.pack(">HBBHHHHLL", 474, packed, 2, 2, width, height, 1, 0, 65535).ljust(512, b"\0")
    rows = [row.astype(">u2") for row in levels[::-1]]
    if not packed:
        return header + b"".join(row.tobytes() for row in rows)
    runs = [
        b"".join(struct.pack(">H", 0x80 | len(part)) + part.tobytes() for part in np.split(row, range(100, width, 100)))
        + bytes(2)
        for row in rows
    ]
    starts = np.cumsum([512 + 8 * height, *map(len, runs)])[:-1]
    return header + struct.pack(f">{2 * height}L", *starts, *map(len, runs)) + b"".join(runs)


FOUR = np.dstack([DEEP, DEEP[..., :1]])
OTHER_DEEP = {
    "CMYK": partial(tiff, photometric=5),
    "premultiplied transparency": partial(tiff, photometric=2, extra_samples=1),
    "CMYK of black alone": lambda levels: tiff(levels * np.uint16([0, 0, 0, 1]), photometric=5),
    "SGI": lambda levels: sgi(levels[..., 0]),
    "SGI, packed": lambda levels: sgi(levels[..., 0], packed=True),
}


@pytest.mark.parametrize("form", OTHER_DEEP)
def test_other_dark_files_of_16_bits_are_refused(form: str, tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(OTHER_DEEP[form](FOUR >> 4))
    with pytest.raises(InputError, match=r"fewer than 13 of their 16 bits; save it with 8 bits per channel"):
        read_image(path)
    path.write_bytes(OTHER_DEEP[form](FOUR))
    assert np.asarray(read_image(path)).std() > 10


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_whose_level_0_is_white(tmp_path: Path, dtype: type):
    levels = GREY.astype(dtype) * (257 if dtype is np.uint16 else 1)
    Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={262: 0})
    content = (tmp_path / "a.tif").read_bytes()
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0
    stored = levels.astype("<u2").tobytes() in content if dtype is np.uint16 else True
    assert stored  # as it is, so that its 0 is white
    expected = 255 - GREY if dtype is np.uint16 else np.asarray(Image.open(tmp_path / "a.tif"))
    assert (
        np.abs(np.asarray(read_image(tmp_path / "a.tif")).astype(int) - np.asarray(expected, int)[..., None]).max() <= 1
    )


@pytest.mark.parametrize(
    ("dtype", "scale", "no_data"),
    [(np.float32, 1 / 255, -999), (np.int32, 1, -12345), (np.uint16, 16, 65535), (np.float32, 1, -0.1)],
)
def test_the_mark_of_missing_cells_that_a_tiff_names(tmp_path: Path, dtype: type, scale: float, no_data: float):
    levels = (GREY * float(scale)).astype(dtype)
    levels[:6] = no_data
    Image.fromarray(levels).save(tmp_path / "a.tif", tiffinfo={pixels.GDAL_NODATA: str(no_data)})
    shown = np.asarray(read_image(tmp_path / "a.tif"))[..., 0].astype(int)
    assert (shown[:6] == 0).all()
    assert np.abs(shown[6:] - GREY[6:].astype(int)).max() <= 1


def test_an_image_without_a_level_is_refused(tmp_path: Path):
    Image.fromarray(np.full((16, 256), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif cannot be read as an image \(none of its levels is a number, or all"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_transparency_over_white_in_bands(mode: str, monkeypatch: pytest.MonkeyPatch):
    image = draw_noise(0, (80, 60)).convert("LA" if mode in ("LA", "La") else "RGBA")
    image.putalpha(Image.linear_gradient("L").resize((80, 60)))
    image = image.convert(mode)
    assert min(read_image(image).getpixel((40, 0))) > 250
    whole = np.asarray(read_image(image))
    monkeypatch.setattr(pixels, "BAND_PIXELS", 333)
    assert (np.asarray(read_image(image)) == whole).all()


# Colours


def test_a_colour_profile_is_ignored(tmp_path: Path):
    """As in the transforms that the backbones' weights were trained with, and in the original's."""
    photo = Image.fromarray(COLOURS)
    photo.save(tmp_path / "a.png", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes())
    assert (np.asarray(read_image(tmp_path / "a.png")) == COLOURS).all()


def test_the_ones_of_an_xbm_are_black(tmp_path: Path):
    path = tmp_path / "a.xbm"
    path.write_text("#define a_width 8\n#define a_height 1\nstatic char a_bits[] = {\n0x01};\n")
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [0, *[255] * 7]


def test_a_long_pgm_keeps_its_white(tmp_path: Path):
    levels = np.linspace(0, 1000, 3400 * 100).astype(">u2").reshape(100, 3400)
    (tmp_path / "a.pgm").write_bytes(b"P5 3400 100 65535\n" + levels.tobytes())
    assert np.asarray(read_image(tmp_path / "a.pgm")).max() <= 4
