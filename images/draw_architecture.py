"""Draw the figure of the encoder and the decoder, images/encoder-decoder.png: an image becomes a feature, then words.

python -m images.draw_architecture
"""

from __future__ import annotations

import random
from itertools import count
from pathlib import Path

import matplotlib.figure
import tyro
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Polygon
from PIL import Image

from captioning.scenes.composition import paint_scene
from captioning.scenes.world import plan

OUTPUT = Path(__file__).with_name("encoder-decoder.png")

# The stages of a ResNet-50 (arXiv 1512.03385, table 1): name, channels, stride in pixels of the image.
STAGES = (
    ("conv1", 64, 2),
    ("layer1", 256, 4),
    ("layer2", 512, 8),
    ("layer3", 1024, 16),
    ("layer4", 2048, 32),
)
WORDS = ("a", "dog", "runs", "on", "the", "beach", ".")
INK, GREY = "#222233", "#777788"
ENCODER, LINEAR, WORD, LSTM = "#7fb3d5", "#f5b971", "#ffffff", "#a9d18e"


def example_image() -> Image.Image:
    """Draw a square image in the style of the sample data set: a dog that runs on a beach."""
    for seed in count():
        rng = random.Random(f"figure/{seed}")
        scene = plan(rng)
        wanted = {"kind": "dog", "action": "running", "setting": "beach", "light": "day", "colour": "red"}
        if wanted.items() <= scene.items() and scene["count"] == 1 and not scene["others"]:
            image = paint_scene(rng, scene).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            return image.crop((left, top, left + side, top + side))
    raise AssertionError("an endless search ended")


def box(axes: Axes, x: float, y: float, width: float, height: float, fill: str, text: str, size: float = 10) -> None:
    """Draw a labeled box with its center at (x, y)."""
    corner, style = (x - width / 2, y - height / 2), "round,pad=0,rounding_size=0.12"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=fill, edgecolor=INK, linewidth=1))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """Draw an arrow from `start` to `end`."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0, **style})


def volume(axes: Axes, x: float, y: float, depth: float, side: float) -> None:
    """Draw a stack of feature maps as a solid: `side` is the maps' size, `depth` their number, x its left edge."""
    d = side * 0.28  # how far the solid recedes
    low, high = y - side / 2, y + side / 2
    right = x + depth
    faces = (
        ([(x, low), (right, low), (right, high), (x, high)], ENCODER),
        ([(x, high), (right, high), (right + d, high + d), (x + d, high + d)], "#b5d4e8"),
        ([(right, low), (right + d, low + d), (right + d, high + d), (right, high)], "#5a92b8"),
    )
    for corners, fill in faces:
        axes.add_patch(Polygon(corners, facecolor=fill, edgecolor=INK, linewidth=0.8, joinstyle="round"))


def draw_encoder(axes: Axes, embed_size: int, image_size: int) -> tuple[float, float]:
    """Draw the encoder, the upper half; returns the position of its output."""
    y = 6.85  # the middle of the row
    axes.imshow(example_image(), extent=(0.1, 2.1, y - 1, y + 1), zorder=2)
    axes.text(1.1, y - 1.15, f"image\n3 × {image_size} × {image_size}", ha="center", va="top", fontsize=10)
    x = 2.85
    arrow(axes, (2.2, y), (x - 0.05, y))
    for name, channels, step in STAGES:
        side, depth = 1.8 * (2 / step) ** 0.45, 0.12 + channels / 2048 * 0.9
        volume(axes, x, y, depth, side)
        cells = image_size // step
        label = f"{name}\n{channels} × {cells} × {cells}"
        middle = x + (depth + side * 0.28) / 2
        axes.text(middle, y - 1.15, label, ha="center", va="top", fontsize=10)
        end = x + depth + side * 0.28
        x = max(end + 0.45, middle + 1.15)
        if name != STAGES[-1][0]:
            arrow(axes, (end + 0.05, y), (x - 0.05, y))
    arrow(axes, (end + 0.05, y), (x + 0.1, y))
    axes.text((end + x) / 2 + 0.05, y + 0.12, "mean", ha="center", va="bottom", fontsize=9, color=GREY)
    axes.add_patch(
        Polygon([(x + 0.1, y - 1), (x + 0.3, y - 1), (x + 0.3, y + 1), (x + 0.1, y + 1)], fc=ENCODER, ec=INK)
    )
    axes.text(x + 0.2, y - 1.15, "feature\n2048", ha="center", va="top", fontsize=10)
    arrow(axes, (x + 0.35, y), (x + 0.72, y))
    box(axes, x + 1.25, y, 1.0, 0.62, LINEAR, "embed\n(linear)", 9.5)
    axes.text(x + 1.25, y - 1.15, f"embedded\n{embed_size}", ha="center", va="top", fontsize=10)
    axes.text(0.1, y + 1.62, "EncoderCNN", fontsize=14, weight="bold", color=INK)
    axes.text(2.2, y + 1.62, "a ResNet-50 without its classifier, and a linear layer", fontsize=11, color=GREY)
    return x + 1.25, y - 1.15


def draw_decoder(axes: Axes, source: tuple[float, float], embed_size: int, hidden_size: int, vocab_size: int) -> None:
    """Draw the decoder, the lower half: the LSTM, unrolled over one caption."""
    first, gap = 2.5, 1.2
    rows = {"in": 0.45, "embed": 1.3, "lstm": 2.25, "linear": 3.2, "out": 4.05}
    inputs, outputs = ("image", "<start>", *WORDS), ("<start>", *WORDS, "<end>")
    for i, (word, target) in enumerate(zip(inputs, outputs, strict=True)):
        x = first + i * gap
        if word == "image":
            turn = 4.62
            axes.plot(
                [source[0], source[0], 1.75, 1.75, x],
                [source[1] - 0.45, turn, turn, 0.85, 0.85],
                color=INK,
                lw=1.6,
            )
            arrow(axes, (x, 0.85), (x, rows["lstm"] - 0.36), lw=1.6)
            axes.text(x, rows["in"], "the image,\nembedded", ha="center", va="center", fontsize=9.5, weight="bold")
        else:
            box(axes, x, rows["in"], 0.98, 0.44, WORD, word)
            arrow(axes, (x, rows["in"] + 0.22), (x, rows["embed"] - 0.22))
            box(axes, x, rows["embed"], 0.86, 0.44, LINEAR, "embed", 9)
            arrow(axes, (x, rows["embed"] + 0.22), (x, rows["lstm"] - 0.36))
        box(axes, x, rows["lstm"], 0.86, 0.72, LSTM, "LSTM")
        if i < len(inputs) - 1:
            arrow(axes, (x + 0.43, rows["lstm"]), (x + gap - 0.43, rows["lstm"]))
        arrow(axes, (x, rows["lstm"] + 0.36), (x, rows["linear"] - 0.22))
        box(axes, x, rows["linear"], 0.86, 0.44, LINEAR, "linear", 9)
        arrow(axes, (x, rows["linear"] + 0.22), (x, rows["out"] - 0.22))
        box(axes, x, rows["out"], 0.98, 0.44, "#fff6d6", target)
    labels = {
        "in": "input",
        "embed": f"word embedding\n{embed_size} numbers",
        "lstm": f"hidden state\n{hidden_size} numbers",
        "linear": f"a score for each\nof {vocab_size:,} words",
        "out": "to be predicted",
    }
    for row, text in labels.items():
        axes.text(0.1, rows[row], text, va="center", fontsize=9.5, color=GREY)
    axes.text(0.1, 4.82, "DecoderRNN", fontsize=14, weight="bold", color=INK)
    axes.text(2.2, 4.82, "the image is the first word that the LSTM reads", fontsize=11, color=GREY)


def draw_architecture(
    embed_size: int = 256, hidden_size: int = 512, vocab_size: int = 10_000, image_size: int = 224
) -> matplotlib.figure.Figure:
    """Draw the whole figure, labeled with these sizes; image_size is in pixels."""
    figure = matplotlib.figure.Figure(figsize=(12.6, 8.56), layout="none")  # pyright: ignore[reportArgumentType]  its stub lacks "none"
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    source = draw_encoder(axes, embed_size, image_size)
    draw_decoder(axes, source, embed_size, hidden_size, vocab_size)
    axes.set(xlim=(0, 12.8), ylim=(0.1, 8.8), aspect="equal")
    axes.axis("off")
    return figure


def main(output: Path = OUTPUT) -> None:
    """Draw the figure of the encoder and the decoder.

    Args:
        output: the PNG file to write.
    """
    draw_architecture().savefig(output, format="png", dpi=110, facecolor="white")
    print(f"drew {output}")


if __name__ == "__main__":
    tyro.cli(main)
