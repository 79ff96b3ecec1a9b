"""Contact sheets and attention maps."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure

from captioning.captioner import Caption, Source
from captioning.errors import InputError
from captioning.images import build_transform, read_photo


def draw_sheet(sources: Sequence[Source], captions: list[str], columns: int = 4) -> matplotlib.figure.Figure:
    """A contact sheet: the photos in rows, each above its caption."""
    rows = -(-len(sources) // columns)
    figure = matplotlib.figure.Figure(figsize=(3.2 * columns, 3.1 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, source, text in zip(figure.axes, sources, captions, strict=False):
        axes.imshow(read_photo(source))
        axes.set_title(textwrap.fill(text, 40), fontsize=10, y=-0.04, va="top")
    return figure


def draw_attention(source: Source, caption: Caption, image_size: int) -> matplotlib.figure.Figure:
    """Where the decoder looked for each word: its map over the part of the photo that the encoder saw."""
    if caption.attention is None:
        raise InputError("this model's decoder does not attend; train one with --decoder attention.")
    cells = round(caption.attention.shape[1] ** 0.5)
    crop = build_transform(False, image_size, normalise=False)(read_photo(source)).permute(1, 2, 0)
    columns = min(5, len(caption.tokens) + 1)
    rows = -(-(len(caption.tokens) + 1) // columns)
    figure = matplotlib.figure.Figure(figsize=(2.2 * columns, 2.45 * rows), layout="constrained")
    figure.suptitle(caption.text, wrap=True)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.axis("off")
    panels[0].imshow(crop)
    panels[0].set_title("photo")
    for axes, word, weights in zip(panels[1:], caption.tokens, caption.attention, strict=False):
        axes.imshow(crop)
        axes.imshow(
            weights.float().reshape(cells, cells),
            extent=(0, image_size, image_size, 0),
            cmap="magma",
            alpha=0.6,
            interpolation="bicubic",
        )
        axes.set_title(word)
    return figure


def save_figure(figure: matplotlib.figure.Figure, path: Path) -> None:
    """Write a figure as a PNG and say where it is, on stderr."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}).") from None
    print(f"drew {path}", file=sys.stderr)
