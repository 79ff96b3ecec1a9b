"""Contact sheets and attention maps."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from captioning.backbones import Preprocessing
from captioning.captioner import Caption, Source
from captioning.errors import InputError, log, printable, warn_once
from captioning.files import check_output, write_file
from captioning.image_files import read_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Matplotlib takes a second to import and most runs do not need it, so the functions that use it import it.

MAX_SHEET = 1000  # images on a sheet, which then has 100 megapixels
CELL = 320  # width of a column, in pixels
THUMBNAIL = (304, 228)  # maximum width and height of a thumbnail, in pixels
MARGIN = (CELL - THUMBNAIL[0]) // 2
LINE_HEIGHT = 18
LINE_LENGTH = 42  # characters
FONT_SIZE = 13
SOFTWARE = "image captioning"  # the PNG text "Software" of a sheet; Matplotlib writes its own name
VEIL, VEIL_SHARE = (128, 128, 128), 0.8  # the colour over the image where the attention is lowest, and its share


def draw_sheet(sources: Sequence[Source], captions: Sequence[str]) -> Image.Image:
    """Draw a contact sheet: thumbnails of the images in rows, each above its caption.

    A row has 4 images for up to 16, and the square root of their number for more. Raises `InputError`
    for more than `MAX_SHEET` images, and for one that cannot be read.
    """
    if len(sources) > MAX_SHEET:
        raise InputError(f"a sheet shows at most {MAX_SHEET:,} images, not {len(sources):,}.")
    columns = max(1, min(max(4, round(len(sources) ** 0.5)), len(sources)))
    font = ImageFont.truetype(_font_file(), FONT_SIZE)
    _warn_of_missing_glyphs("sheet", captions)
    texts = [_wrap(printable(text), font) for text in captions]
    rows = [range(i, min(i + columns, len(sources))) for i in range(0, len(sources), columns)]
    lines = [max(len(texts[i]) for i in row) for row in rows]
    height = len(rows) * (THUMBNAIL[1] + 3 * MARGIN) + sum(lines) * LINE_HEIGHT
    sheet = Image.new("RGB", (columns * CELL, height), "white")
    draw = ImageDraw.Draw(sheet)
    bottom = 0
    for row, count in zip(rows, lines, strict=True):
        bottom += MARGIN + THUMBNAIL[1]  # of the row's thumbnails
        for column, i in enumerate(row):
            middle = column * CELL + CELL // 2
            thumbnail = ImageOps.contain(read_image(sources[i], min(THUMBNAIL)), THUMBNAIL)
            sheet.paste(thumbnail, (middle - thumbnail.width // 2, bottom - thumbnail.height))
            for line, text in enumerate(texts[i]):
                draw.text((middle, bottom + MARGIN + line * LINE_HEIGHT), text, "black", font, anchor="ma")
        bottom += count * LINE_HEIGHT + 2 * MARGIN
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break a caption into lines of at most `LINE_LENGTH` characters, or fewer if they are wide."""
    widest = max((font.getlength(text[i : i + LINE_LENGTH]) for i in range(len(text))), default=0)
    return textwrap.wrap(text, LINE_LENGTH if widest <= CELL else max(1, int(LINE_LENGTH * CELL / widest)))


def _font_file() -> str:
    """Return the font of Matplotlib's figures, which is used for sheets, too."""
    from matplotlib.font_manager import FontProperties, findfont

    return findfont(FontProperties())


def _warn_of_missing_glyphs(figure: str, captions: Sequence[str]) -> None:
    from matplotlib.ft2font import FT2Font

    known = FT2Font(_font_file()).get_charmap()
    missing = next((char for text in captions for char in text if ord(char) not in known and not char.isspace()), None)
    if missing is not None:
        warn_once(f"the {figure} shows boxes for characters that its font lacks, such as {missing}.")


def scale_attention(weights: Tensor) -> np.ndarray:
    """Scale one word's attention (cells,) to a square map, 0 where it is lowest and 1 where it is highest.

    Every map spans the whole range, as the weights of a grid sum to 1 and often differ by less than a tenth. A map of
    equal weights is 0.
    """
    side = round(len(weights) ** 0.5)
    grid = weights.float().cpu().numpy().reshape(side, side)
    span = grid.max() - grid.min()
    return (grid - grid.min()) / span if span > 0 else np.zeros_like(grid)


def overlay_attention(view: Image.Image, weights: Tensor) -> Image.Image:
    """Draw the encoder's view of an image, clear where the decoder looked for one word and grey elsewhere."""
    mask = Image.fromarray((255 * scale_attention(weights)).astype(np.uint8)).resize(
        view.size, Image.Resampling.BICUBIC
    )
    return Image.composite(view, Image.blend(view, Image.new("RGB", view.size, VEIL), VEIL_SHARE), mask)


def draw_attention(source: Source, caption: Caption, preprocessing: Preprocessing) -> Figure:
    """Draw a caption's attention: for each word its map over the encoder's view of the image."""
    from matplotlib.figure import Figure

    if caption.attention is None:
        raise InputError("this model's decoder does not attend; train one with --decoder attention.")
    _warn_of_missing_glyphs("figure", [caption.text])
    size = preprocessing.image_size
    view = preprocessing.view(read_image(source, size), size)
    columns = min(5, len(caption.tokens) + 1)
    rows = -(-(len(caption.tokens) + 1) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.45 * rows), layout="constrained")
    figure.suptitle(caption.text, wrap=True, parse_math=False)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    panels[0].imshow(view)
    panels[0].set_title("image")
    for axes, word, weights in zip(panels[1:], caption.tokens, caption.attention, strict=False):
        axes.imshow(overlay_attention(view, weights))
        axes.set_title(word, parse_math=False)
    return figure


def check_figure(path: Path) -> None:
    """Raise `InputError` before a long computation if no figure can be written to `path`, or another file is there."""
    check_output(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} does not end in .png, but figures are PNG files; name it {path.stem}.png.")
    software = ""
    if path.exists():
        with suppress(Exception), Image.open(path) as image:  # reads the header only
            software = str(image.info.get("Software", ""))
        if not software.startswith(("Matplotlib", SOFTWARE)):
            raise InputError(f"{path} exists and may not be a figure; delete it, or name another file.")


def save_figure(figure: Figure | Image.Image, path: Path) -> None:
    """Write a figure or a sheet as a PNG file, and print its path on stderr."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(figure, Image.Image):
            description = PngInfo()
            description.add_text("Software", SOFTWARE)
            write_file(path, partial(figure.save, format="PNG", pnginfo=description))
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Glyph .* missing from font")  # `_warn_of_missing_glyphs` has warned
                write_file(path, partial(figure.savefig, format="png", dpi=100))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from None
    log(f"drew {path}")
