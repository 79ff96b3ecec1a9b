"""The sample data set: drawn scenes with five captions each, laid out on disk as COCO is.

A scene is planned first (what, how many, which colour, doing what, where, in what light, beside what), then
painted and captioned from the plan, so `check` can say whether any caption of the picture names the right
thing. Picture i of a split depends on the seed, the split and i alone: the same seed gives the same bytes on
any number of processes.

    python scenes.py data/scenes --train 4000 --val 500 --test 500 --seed 0
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import tyro
from PIL import Image, ImageDraw
from tqdm import tqdm

from captioning.errors import InputError, run_command

VERSION = "2"
SPLITS = ("train", "val", "test")
PICTURES_AT_MOST = 1_000_000  # of a split: its picture ids follow those of the split before
SUPERSAMPLING = 2
HALF_SQUARE = 0.43  # the main thing stays this close to the centre, in shorter sides, so a centre crop keeps it
GREYSCALE_SHARE = 0.04
OVERLAP = 0.3  # how much of a thing's width the next of several may cover
ALONE_AT_MOST = 400  # pictures that are drawn sooner than other processes start

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 40),
    "orange": (255, 136, 10),
    "yellow": (255, 224, 40),
    "green": (22, 148, 62),
    "blue": (30, 88, 226),
    "purple": (146, 54, 190),
    "white": (250, 250, 252),
    "black": (30, 30, 36),
}
INK, GLASS, WOOD, TYRE = (44, 38, 52), (190, 226, 244), (134, 88, 52), (48, 48, 54)
BEAK, ROSE, MOONLIT = (255, 170, 40), (240, 150, 160), (255, 244, 214)
SKINS = ((250, 214, 184), (222, 170, 130), (142, 92, 62))
HAIRS = ((60, 40, 30), (124, 74, 38), (32, 28, 32))


# --- painting ---------------------------------------------------------------------------------------------


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour `a` with this share of `b` in it."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


@cache
def at(text: str) -> list[Point]:
    """Points written "x,y x,y" in hundredths of a thing's unit."""
    numbers = [[float(number) / 100 for number in pair.split(",")] for pair in text.split()]
    return [(x, y) for x, y in numbers]


@cache
def smooth(text: str, steps: int = 5) -> list[Point]:
    """A closed curve through the points of `at` (Catmull-Rom), as a polygon."""
    points, curve = at(text), []
    for i in range(len(points)):
        corners = [points[(i + k) % len(points)] for k in (-1, 0, 1, 2)]
        for t in (step / steps for step in range(steps)):
            x, y = (
                b + t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * b - a - 3 * c + d))) / 2
                for a, b, c, d in zip(*corners, strict=True)
            )
            curve.append((x, y))
    return curve


@cache
def glow_mask() -> Image.Image:
    """A soft round spot, opaque in the middle."""
    return Image.radial_gradient("L").point([max(0, round(255 - 1.45 * v)) for v in range(256)])


@dataclass
class Paint:
    """The colours that one thing is painted in."""

    base: Colour
    skin: Colour = SKINS[0]
    hair: Colour = HAIRS[0]

    @property
    def dark(self) -> Colour:
        """The base in shade; of black, a grey that still shows on it."""
        return mix(self.base, (0, 0, 0), 0.24) if sum(self.base) > 150 else (84, 84, 94)

    @property
    def light(self) -> Colour:
        """The base in light."""
        return mix(self.base, (255, 255, 255), 0.34 if sum(self.base) > 150 else 0.2)


class Pen:
    """Draws in a thing's own units: x to the right, y up, from the point (x, y) of the image.

    While `outline` is a colour, every shape is drawn in it and a little larger; filling the same shapes
    afterwards leaves a line around the whole thing.
    """

    def __init__(self, image: Image.Image, x: float, y: float, scale: float, flip: bool = False):
        self.image, self.draw = image, ImageDraw.Draw(image)
        self.x, self.y, self.scale, self.side = x, y, scale, -1 if flip else 1
        self.outline: Colour | None = None
        self.edge = 1.3 * SUPERSAMPLING

    def place(self, points: list[Point]) -> list[Point]:
        """Pixels of the points."""
        x, y, across, scale = self.x, self.y, self.side * self.scale, self.scale
        return [(x + across * px, y - scale * py) for px, py in points]

    def polygon(self, points: list[Point], fill: Colour) -> None:
        """A filled polygon."""
        pixels = self.place(points)
        self.draw.polygon(pixels, self.outline or fill)
        if self.outline:
            joint = "curve" if len(pixels) < 9 else None
            self.draw.line([*pixels, *pixels[:2]], self.outline, round(2 * self.edge), joint)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A filled ellipse about (x, y)."""
        grow = self.edge if self.outline else 0
        px, py = self.x + self.side * self.scale * x, self.y - self.scale * y
        rx, ry = rx * self.scale + grow, ry * self.scale + grow
        self.draw.ellipse((px - rx, py - ry, px + rx, py + ry), self.outline or fill)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Colour) -> None:
        """A filled rectangle."""
        (x0, y0), (x1, y1) = self.place([(left, top), (right, bottom)])
        grow = self.edge if self.outline else 0
        corners = (min(x0, x1) - grow, y0 - grow, max(x0, x1) + grow, y1 + grow)
        self.draw.rectangle(corners, self.outline or fill)

    def line(self, points: list[Point], width: float, fill: Colour) -> None:
        """A line with round ends; `width` in the thing's units, at least a pixel."""
        width = max(width * self.scale, SUPERSAMPLING) + (2 * self.edge if self.outline else 0)
        pixels = self.place(points)
        fill = self.outline or fill
        self.draw.line(pixels, fill, round(width), "curve" if len(pixels) > 2 else None)
        if width > 3 * SUPERSAMPLING:
            r = width / 2
            for x, y in (pixels[0], pixels[-1]):
                self.draw.ellipse((x - r, y - r, x + r, y + r), fill)

    def detail(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        """A small ellipse inside the thing, without an outline of its own."""
        if not self.outline:
            self.oval(x, y, rx, ry, fill)

    def patch(self, points: list[Point], fill: Colour) -> None:
        """A polygon inside the thing, without an outline of its own."""
        if not self.outline:
            self.draw.polygon(self.place(points), fill)

    def glow(self, x: float, y: float, rx: float, ry: float, fill: Colour, strength: float = 1.0) -> None:
        """A soft spot about (x, y): sunlight, a lamp, a shadow."""
        (px, py), rx, ry = self.place([(x, y)])[0], round(rx * self.scale), round(ry * self.scale)
        mask = glow_mask().resize((2 * rx, 2 * ry), Image.Resampling.BILINEAR)
        if strength < 1:
            mask = mask.point([round(v * strength) for v in range(256)])
        self.image.paste(fill, (round(px) - rx, round(py) - ry), mask)

    def bands(self, left: float, top: float, right: float, bottom: float, colours: list[Colour]) -> None:
        """A rectangle whose colours run from top to bottom."""
        (x0, y0), (x1, y1) = self.place([(left, top), (right, bottom)])
        x0, y0, x1, y1 = math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)
        column = Image.new("RGB", (1, len(colours)))
        column.putdata(colours)
        column = column.resize((1, y1 - y0), Image.Resampling.BICUBIC)
        self.image.paste(column.resize((x1 - x0, y1 - y0), Image.Resampling.NEAREST), (x0, y0))


# --- things: feet on y = 0, middle at x = 0, looking to the right ------------------------------------------


def legs(pen: Pen, hips: float, feet: dict[float, float], width: float, fill: Colour, hoof: Colour) -> None:
    """Legs from x to x + how far each foot is thrown; a thrown foot is off the ground."""
    for x, throw in feet.items():
        foot = (x + throw, 0.03 + abs(throw) * 0.4)
        knee = (x + throw * 0.7, hips * 0.55 + 0.02)
        pen.line([(x, hips), knee, foot], width, fill)
        pen.oval(foot[0] + 0.02, foot[1], width * 0.62, width * 0.42, hoof)


def dog(pen: Pen, paint: Paint, action: str) -> None:
    """Large head, floppy ear, raised tail, short legs."""
    throws = (-0.2, -0.1, 0.18, 0.1) if action == "running" else (0, 0, 0, 0)
    legs(pen, 0.34, {-0.42: throws[1], 0.06: throws[3]}, 0.15, paint.dark, paint.dark)
    pen.line(at("-64,46 -80,66 -78,88"), 0.13, paint.base)
    legs(pen, 0.34, {-0.58: throws[0], 0.22: throws[2]}, 0.17, paint.base, paint.light)
    pen.polygon(smooth("-70,50 -40,58 10,58 36,52 34,28 0,20 -44,20 -72,28"), paint.base)
    pen.polygon(smooth("0,62 6,92 28,106 52,98 62,84 86,78 88,60 60,50 40,40 14,44"), paint.base)
    pen.line(at("8,54 40,40"), 0.08, (236, 196, 64))
    pen.polygon(smooth("16,102 -4,92 -16,60 -8,42 8,50 20,74 28,96"), paint.dark)
    pen.detail(0.47, 0.83, 0.06, 0.07, (255, 255, 255))
    pen.detail(0.49, 0.83, 0.038, 0.05, INK)
    pen.detail(0.86, 0.73, 0.075, 0.065, INK)
    pen.patch(at("62,54 78,58 76,40 66,40"), ROSE)


def cat(pen: Pen, paint: Paint, action: str) -> None:
    """Sits facing us: pointed ears, whiskers, a curled tail."""
    pen.line(at("20,8 42,10 48,28 40,46 46,56"), 0.1, paint.dark)
    pen.polygon(smooth("-27,4 -34,22 -22,52 22,52 34,22 27,4 0,0"), paint.base)
    pen.patch(smooth("-12,8 -13,36 0,46 13,36 12,8"), paint.light)
    for side in (-1, 1):
        pen.polygon([(side * 0.3, 0.66), (side * 0.3, 1.1), (side * 0.02, 0.86)], paint.base)
        pen.patch([(side * 0.25, 0.78), (side * 0.262, 1), (side * 0.1, 0.86)], ROSE)
        pen.oval(side * 0.13, 0.05, 0.11, 0.06, paint.light)
    pen.oval(0, 0.68, 0.31, 0.24, paint.base)
    for side in (-1, 1):
        pen.detail(side * 0.12, 0.72, 0.07, 0.07, (250, 252, 220))
        pen.detail(side * 0.12, 0.72, 0.03, 0.065, INK)
        for y in (0.2, 0.32):
            pen.patch([(side * 0.31, y - 0.03), (side * 0.31, y + 0.04), (side * 0.16, y)], paint.dark)
        if not pen.outline:
            for y in (0.55, 0.61, 0.67):
                whisker = [(side * 0.1, 0.6), (side * 0.4, y)]
                pen.line(whisker, 0.012, mix(paint.base, INK if sum(paint.base) > 300 else MOONLIT, 0.6))
    for x in (-0.09, 0, 0.09):
        pen.patch([(x - 0.028, 0.91), (x + 0.028, 0.91), (x, 0.8)], paint.dark)
    pen.patch([(-0.045, 0.635), (0.045, 0.635), (0, 0.59)], ROSE)


def horse(pen: Pen, paint: Paint, action: str) -> None:
    """Upright neck, mane, saddle, long thin legs, a hanging tail."""
    hair = mix(paint.base, (40, 26, 20), 0.62) if sum(paint.base) > 150 else (112, 108, 116)
    throws = (-0.26, -0.12, 0.28, 0.14) if action == "galloping" else (0, 0, 0, 0)
    legs(pen, 0.66, {-0.34: throws[1], 0.14: throws[3]}, 0.085, paint.dark, hair)
    pen.polygon(smooth("-48,86 -64,82 -74,48 -66,30 -58,46 -50,70"), hair)
    legs(pen, 0.66, {-0.44: throws[0], 0.26: throws[2]}, 0.095, paint.base, hair)
    pen.polygon(smooth("-52,84 -20,82 16,86 36,80 32,60 4,54 -28,56 -54,62"), paint.base)
    pen.polygon(at("34,136 38,154 46,134"), paint.base)
    pen.polygon(smooth("8,78 20,108 28,138 42,140 70,114 66,102 56,102 46,112 42,84 34,62"), paint.base)
    pen.polygon(smooth("36,150 22,142 10,112 -2,84 10,84 24,112 34,136"), hair)
    pen.patch(smooth("-30,86 -10,84 8,88 6,68 -12,66 -26,68"), (250, 244, 226))
    pen.patch(smooth("-26,90 -10,86 4,91 0,76 -12,74 -22,76"), WOOD)
    pen.detail(0.46, 1.28, 0.028, 0.034, INK if sum(paint.base) > 150 else (240, 240, 240))
    pen.detail(0.64, 1.08, 0.016, 0.02, INK)


def bird(pen: Pen, paint: Paint, action: str) -> None:
    """Flying with both wings up, or standing on two thin legs."""
    flying = action == "flying"
    hx, hy = (0.42, 0.4) if flying else (0.34, 1.12)
    pen.polygon([(hx + 0.12, hy + 0.09), (hx + 0.4, hy - 0.02), (hx + 0.12, hy - 0.11)], BEAK)
    if flying:
        pen.polygon(smooth("22,36 46,66 62,110 58,134 40,124 14,84 -4,40"), paint.dark)
        pen.polygon(at("-30,32 -66,36 -60,24 -68,12 -30,16"), paint.dark)
        pen.polygon(smooth("-44,28 -20,40 16,44 40,38 30,14 4,4 -24,10"), paint.base)
    else:
        for x in (-0.02, 0.12):
            pen.line([(x, 0.5), (x, 0.02), (x + 0.12, 0.02)], 0.045, BEAK)
        pen.polygon(at("-24,86 -78,62 -74,48 -22,56"), paint.dark)
        pen.polygon(smooth("-46,76 -14,98 14,104 28,120 44,100 40,72 18,44 -20,48"), paint.base)
    pen.oval(hx, hy, 0.2, 0.19, paint.base)
    wing = "16,38 0,76 -30,118 -54,134 -60,108 -44,66 -20,28" if flying else "-50,58 -24,88 8,86 12,66 -16,54"
    pen.polygon(smooth(wing), paint.light if flying else paint.dark)
    pen.detail(hx + 0.07, hy + 0.05, 0.055, 0.06, (255, 255, 255))
    pen.detail(hx + 0.08, hy + 0.05, 0.034, 0.042, INK)


def person(pen: Pen, paint: Paint, action: str, woman: bool) -> None:
    """A man in a coat, trousers and a hat, or a woman with long hair in a wide dress."""
    stride = 0.13 if action == "walking" else 0.02
    cloth, sleeve = (paint.skin, paint.skin) if woman else ((74, 78, 98), paint.base)
    if woman:
        pen.polygon(smooth("0,101 15,94 19,72 10,66 -10,66 -19,72 -15,94"), paint.hair)
    for side in (-1, 1):
        foot = side * (0.08 + stride)
        pen.line([(side * 0.08, 0.42), (foot, 0.05)], 0.075 if woman else 0.13, cloth)
        pen.oval(foot + 0.03, 0.03, 0.08, 0.035, INK)
    raised = {"waving": (0.3, 0.96), "holding": (0.34, 0.6)}.get(action)
    for side in (-1, 1):
        hand = raised if raised and side == 1 else (side * (0.24 + stride * 0.6), 0.42)
        elbow = (0.29, 0.66 if action == "waving" else 0.54) if hand == raised else (side * 0.21, 0.6)
        pen.line([(side * 0.13, 0.74), elbow, hand], 0.065 if woman else 0.1, sleeve)
        pen.oval(*hand, 0.045, 0.045, paint.skin)
    if woman:
        pen.polygon(smooth("-11,78 0,76 11,78 12,58 38,16 0,12 -38,16"), paint.base)
        pen.patch(at("-11.5,60 11.5,60 14,54 -14,54"), paint.dark)
    else:
        pen.polygon(at("-15,79 15,79 21,72 20,40 -20,40 -21,72"), paint.base)
        pen.box(-0.012, 0.4, 0.012, 0.76, paint.dark)
    pen.oval(0, 0.87, 0.11, 0.115, paint.skin)
    if woman:
        pen.patch(smooth("0,100 13,93 12,87 0,94 -12,87 -13,93"), paint.hair)
    else:
        pen.box(-0.2, 0.92, 0.2, 0.955, INK)
        pen.polygon(at("-10,95 10,95 8.5,105 -8.5,105"), INK)
    for x in (-0.02, 0.06):
        pen.detail(x, 0.87, 0.014, 0.018, INK)


man, woman = partial(person, woman=False), partial(person, woman=True)


def car(pen: Pen, paint: Paint, action: str) -> None:
    """Low and long with a round roof."""
    if action == "driving" and not pen.outline:
        for y, x in ((0.3, -1.36), (0.5, -1.28), (0.7, -1.16)):
            pen.line([(x, y), (x + 0.26, y)], 0.035, (255, 255, 255))
    pen.polygon(smooth("-100,20 -101,46 -72,60 -44,92 0,98 34,90 62,60 96,52 102,24 60,16 -60,16"), paint.base)
    pen.patch(at("-98,22 99,22 98,34 -99,34"), paint.dark)
    pen.patch(at("-56,60 -36,86 -6,87 -6,60"), GLASS)
    pen.patch(at("2,60 2,87 24,85 48,60"), GLASS)
    pen.detail(0.92, 0.46, 0.07, 0.06, (255, 246, 190))
    for x in (-0.56, 0.58):
        pen.oval(x, 0.2, 0.21, 0.2, TYRE)
        pen.detail(x, 0.2, 0.1, 0.1, (206, 206, 212))


def bus(pen: Pen, paint: Paint, action: str) -> None:
    """A tall box with two rows of windows."""
    if action == "driving" and not pen.outline:
        for y, x in ((0.3, -0.94), (0.55, -0.98), (0.8, -0.92)):
            pen.line([(x, y), (x + 0.17, y)], 0.025, (255, 255, 255))
    pen.polygon(at("-70,10 -70,97 -66,100 64,100 70,94 72,10"), paint.base)
    pen.box(-0.7, 0.1, 0.72, 0.2, paint.dark)
    pen.box(-0.7, 0.57, 0.72, 0.61, paint.dark)
    for y in (0.33, 0.69):
        for x in (-0.62, -0.35, -0.08, 0.19, 0.46):
            pen.box(x, y, x + 0.2, y + 0.2, GLASS)
    pen.detail(0.68, 0.25, 0.035, 0.035, (255, 246, 190))
    for x in (-0.42, 0.42):
        pen.oval(x, 0.12, 0.13, 0.12, TYRE)
        pen.detail(x, 0.12, 0.06, 0.06, (206, 206, 212))


def boat(pen: Pen, paint: Paint, action: str) -> None:
    """A hull under two sails."""
    pen.line([(0, 0.2), (0, 1)], 0.035, WOOD)
    pen.polygon([(0.05, 0.3), (0.05, 0.97), (0.54, 0.3)], paint.base)
    pen.polygon([(-0.05, 0.32), (-0.05, 0.86), (-0.44, 0.32)], paint.light)
    pen.polygon(at("-58,24 64,24 44,1 -42,1"), paint.base)
    pen.patch(at("-58,24 64,24 60,18 -54,18"), paint.dark)
    if action == "sailing" and not pen.outline:
        for x in (-0.5, -0.2, 0.1, 0.4):
            pen.oval(x, 0, 0.17, 0.025, (240, 248, 255))


def plane(pen: Pen, paint: Paint, action: str) -> None:
    """Seen from the side: tail fin, swept wings, a row of windows, two trails behind."""
    if not pen.outline:
        for y in (0.42, 0.54):
            pen.line([(-1.5, y), (-1.0, y)], 0.05, (255, 255, 255))
    pen.polygon(at("18,60 -16,60 -44,94 -26,94"), paint.dark)
    pen.polygon(at("-92,52 -104,98 -82,98 -52,60"), paint.dark)
    pen.polygon(smooth("-96,56 -60,38 40,30 84,36 100,47 82,60 40,66 -60,64"), paint.base)
    pen.polygon(at("-90,52 -110,44 -100,38 -62,46"), paint.dark)
    for x in (-0.5, -0.32, -0.14, 0.04, 0.22, 0.4):
        pen.detail(x, 0.54, 0.045, 0.05, GLASS)
    pen.patch(at("66,50 92,50 80,59 66,60"), GLASS)
    pen.polygon(at("24,42 -20,42 -60,2 -38,2"), paint.light)


def kite(pen: Pen, paint: Paint, action: str) -> None:
    """A diamond with a tail of bows."""
    tail = at("0,36 7,28 -6,18 6,9 0,1")
    pen.line(tail, 0.022, INK)
    for x, y in tail[1:4]:
        pen.polygon([(x, y), (x - 0.09, y + 0.045), (x - 0.09, y - 0.045)], paint.base)
        pen.polygon([(x, y), (x + 0.09, y + 0.045), (x + 0.09, y - 0.045)], paint.dark)
    pen.polygon(at("0,100 33,72 0,32 -33,72"), paint.base)
    pen.patch([(0, 1), (0.33, 0.72), (0, 0.72)], paint.light)
    pen.patch([(0, 0.72), (0, 0.32), (-0.33, 0.72)], paint.dark)


def balloon(pen: Pen, paint: Paint, action: str) -> None:
    """Pear-shaped on a string."""
    if pen.outline:  # a single thin line in the outline's colour shows everywhere
        pen.draw.line(pen.place(smooth("0,40 4,28 -4,14 0,0 -4,14 4,28")), pen.outline, round(pen.edge))
    pen.polygon([(0, 0.42), (0.06, 0.35), (-0.06, 0.35)], paint.dark)
    pen.polygon(smooth("0,100 20,95 30,76 20,54 0,40 -20,54 -30,76 -20,95"), paint.base)
    pen.patch(smooth("10,96 26,76 12,52 20,74"), paint.dark)
    pen.detail(-0.12, 0.84, 0.06, 0.085, mix(paint.base, (255, 255, 255), 0.65))


def ball(pen: Pen, paint: Paint, action: str) -> None:
    """Round, with panels."""
    panel = (190, 194, 204) if min(paint.base) > 240 else (252, 252, 252)
    pen.oval(0, 0.5, 0.5, 0.5, paint.base)
    pen.patch(smooth("-10,97 8,50 -10,3 -24,50"), panel)
    pen.patch(smooth("26,90 44,60 40,26 30,50"), panel)
    pen.patch(smooth("-32,86 -48,50 -32,14 -40,50"), panel)
    pen.detail(0.16, 0.78, 0.09, 0.06, mix(paint.base, (255, 255, 255), 0.6))


RIM = [(0.6 - 0.3 * (i + t / 4), 0.5 + 0.07 * math.sin(math.pi * t / 4)) for i in range(4) for t in range(4)]
DOME = [(0.62 * math.cos(a / 12 * math.pi), 0.5 + 0.44 * math.sin(a / 12 * math.pi)) for a in range(13)]


def umbrella(pen: Pen, paint: Paint, action: str) -> None:
    """A scalloped dome on a hooked stick."""
    pen.line([(0, 0.94), (0, 0.99)], 0.03, WOOD)
    pen.line(at("0,60 0,6 5,2 11,2 15,8"), 0.04, WOOD)
    pen.polygon(DOME + RIM[::-1], paint.base)
    pen.patch(smooth("0,94 26,74 30,52 15,56 0,52 4,74"), paint.dark)
    pen.patch(
        smooth("0,94 -42,80 -60,52 -45,56 -30,52 -22,74"),
        paint.dark,
    )


def tree(pen: Pen, paint: Paint, action: str) -> None:
    """A palm on the beach, a pine in the snow, else a round crown; `action` is the setting."""
    pen.polygon(at("-6,0 7,0 4,55 -4,55"), WOOD)
    if action == "beach":
        for side in (-1, 1):
            for leaf in ("0,68 26,86 46,62 22,72", "0,68 16,98 42,92 18,84", "0,66 10,92 4,104 -4,84"):
                pen.polygon([(side * x, y) for x, y in smooth(leaf)], (62, 130, 62))
    elif action == "snow":
        for y, half in ((0.16, 0.36), (0.4, 0.28), (0.64, 0.2)):
            pen.polygon([(-half, y), (half, y), (0, y + 0.36)], (46, 100, 84))
            pen.patch([(-half * 0.45, y + 0.2), (half * 0.45, y + 0.2), (0, y + 0.36)], (244, 248, 255))
    else:
        for x, y, r in ((-0.2, 0.6, 0.22), (0.2, 0.6, 0.22), (0, 0.76, 0.25)):
            pen.oval(x, y, r, r, (70, 126, 66))
        pen.detail(-0.06, 0.78, 0.14, 0.13, (92, 150, 80))


def bench(pen: Pen, paint: Paint, action: str) -> None:
    """Slats on two legs."""
    for x in (-0.6, 0.6):
        pen.line([(x, 0.02), (x, 0.6)], 0.07, TYRE)
    for y in (0.3, 0.52, 0.7):
        pen.box(-0.78, y, 0.78, y + 0.12, paint.base)


def house(pen: Pen, paint: Paint, action: str) -> None:
    """Walls under a steep roof."""
    pen.polygon(at("24,70 24,98 36,98 36,66"), (150, 96, 84))
    pen.box(-0.45, 0, 0.45, 0.58, paint.base)
    pen.polygon([(-0.56, 0.55), (0.56, 0.55), (0.0, 1)], (112, 84, 80))
    pen.box(-0.1, 0, 0.1, 0.32, WOOD)
    for x in (-0.3, 0.3):
        pen.box(x - 0.09, 0.22, x + 0.09, 0.42, (255, 238, 170))


def snowman(pen: Pen, paint: Paint, action: str) -> None:
    """Three balls of snow, a carrot and a hat."""
    for y, r in ((0.22, 0.25), (0.55, 0.19), (0.8, 0.14)):
        pen.oval(0, y, r, r * 0.95, (250, 252, 255))
    pen.polygon([(0.03, 0.82), (0.24, 0.78), (0.03, 0.77)], BEAK)
    pen.polygon(at("-10,90 10,90 9,104 -9,104"), INK)
    for x, y in ((-0.05, 0.85), (0.05, 0.85), (0, 0.6), (0, 0.5)):
        pen.detail(x, y, 0.02, 0.02, INK)


def lighthouse(pen: Pen, paint: Paint, action: str) -> None:
    """A striped tower on a rock."""
    pen.polygon(smooth("-34,0 -20,14 18,16 36,0"), (120, 116, 120))
    pen.polygon(at("-16,12 16,12 10,74 -10,74"), (250, 248, 244))
    for y, half in ((0.24, 0.148), (0.48, 0.125)):
        pen.patch([(-half, y), (half, y), (half - 0.012, y + 0.12), (0.012 - half, y + 0.12)], (196, 84, 80))
    pen.box(-0.09, 0.74, 0.09, 0.86, (255, 240, 160))
    pen.polygon([(-0.13, 0.86), (0.13, 0.86), (0, 1)], (196, 84, 80))


# --- settings ---------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What a setting is painted on: x and y in shorter sides from the centre, y up."""

    pen: Pen
    rng: random.Random
    light: str
    wide: float  # half the width
    high: float  # half the height
    horizon: float

    def ground(self, *colours: Colour) -> None:
        """Everything below the horizon, in the light of the scene."""
        tint, share = {"dusk": ((150, 70, 110), 0.2), "cloudy": ((130, 140, 150), 0.16)}.get(self.light, ((0, 0, 0), 0))
        shades = [mix(colour, tint, share) for colour in colours]
        self.pen.bands(-self.wide, self.horizon, self.wide, -self.high, shades)

    def scatter(self, count: int, low: float, high: float) -> Iterator[Point]:
        """Points over the whole width between two heights."""
        return ((self.rng.uniform(-self.wide, self.wide), self.rng.uniform(low, high)) for _ in range(count))

    def ridge(self, low: float, high: float, waves: float) -> list[Point]:
        """A rolling skyline between two heights, closed at the bottom."""
        phase, step = self.rng.uniform(0, 6), 2 * self.wide / 20
        xs = [-self.wide + i * step for i in range(21)]
        line = [(x, low + (high - low) * (0.5 + 0.5 * math.sin(phase + waves * x))) for x in xs]
        return [*line, (self.wide, -self.high), (-self.wide, -self.high)]


SKIES = {
    "day": [(58, 142, 226), (124, 190, 244), (206, 234, 252)],
    "cloudy": [(136, 152, 168), (174, 186, 198), (208, 214, 220)],
    "dusk": [(84, 66, 138), (206, 104, 132), (255, 188, 130)],
    "night": [(10, 14, 44), (24, 28, 74), (62, 50, 110)],
}


def sky(stage: Stage) -> None:
    """Sky with what the light brings: sun, clouds, moon and stars."""
    pen, rng, light = stage.pen, stage.rng, stage.light
    pen.bands(-stage.wide, stage.high, stage.wide, stage.horizon - 0.02, SKIES[light])
    x = rng.choice((-1, 1)) * rng.uniform(0.24, 0.4)
    if light == "night":
        for px, py in stage.scatter(45, 0, stage.high):
            pen.detail(px, py, 0.004, 0.004, (230, 230, 255))
        pen.glow(x, 0.32, 0.17, 0.17, (200, 200, 240), 0.5)
        pen.oval(x, 0.32, 0.055, 0.055, (250, 244, 214))
        pen.oval(x + 0.02, 0.335, 0.012, 0.012, (226, 218, 186))
    elif light == "dusk":
        pen.glow(x, stage.horizon + 0.06, 0.34, 0.3, (255, 226, 150), 0.9)
        pen.oval(x, stage.horizon + 0.06, 0.075, 0.075, (255, 240, 190))
    elif light == "day":
        pen.glow(x, 0.34, 0.22, 0.22, (255, 250, 214), 0.8)
        pen.oval(x, 0.34, 0.06, 0.06, (255, 250, 206))
    if light != "night":
        white = {"day": (255, 255, 255), "cloudy": (226, 230, 234), "dusk": (250, 176, 160)}[light]
        for px, py in stage.scatter(6 if light == "cloudy" else 3, 0.22, stage.high):
            r = rng.uniform(0.03, 0.06)
            for dx, dy, k in ((-1.3, 0, 0.8), (0, 0.5, 1.1), (1.4, 0.1, 0.8), (0.1, -0.2, 1)):
                pen.oval(px + dx * r, py + dy * r, 1.4 * k * r, 0.75 * k * r, white)


def waves(stage: Stage, count: int, low: float, high: float, fill: Colour) -> None:
    """Short curved crests."""
    for x, y in stage.scatter(count, low, high):
        w = 0.03 + 0.12 * (high - y)
        stage.pen.line([(x - w, y - 0.006), (x, y + 0.006), (x + w, y - 0.006)], 0.007, fill)


def beach(stage: Stage) -> None:
    """Sand, surf and a strip of water."""
    pen, shore = stage.pen, stage.horizon - 0.13
    sky(stage)
    stage.ground((28, 132, 190), (66, 178, 206), (120, 208, 214), (120, 208, 214))
    waves(stage, 14, shore + 0.03, stage.horizon - 0.015, (196, 234, 240))
    phase = stage.rng.uniform(0, 6)
    xs = [-stage.wide + i * stage.wide / 14 for i in range(29)]
    dusky = stage.light == "dusk"
    for lift, fill in ((0.022, (255, 255, 255)), (0, (232, 190, 150) if dusky else (246, 220, 164))):
        rim = [(x, shore + lift + 0.014 * math.sin(phase + 11 * x)) for x in xs]
        pen.polygon([*rim, (stage.wide, -stage.high), (-stage.wide, -stage.high)], fill)
    near, far = ((206, 150, 120), (232, 190, 150)) if dusky else ((228, 188, 120), (246, 220, 164))
    pen.bands(-stage.wide, shore - 0.014, stage.wide, -stage.high, [far, mix(far, near, 0.5), near])
    for x, y in stage.scatter(60, -stage.high, shore - 0.03):
        pen.detail(x, y, 0.006, 0.003, mix(near, WOOD, 0.4))
    for x, y in stage.scatter(4, -stage.high, shore - 0.06):
        star = [(math.sin(k * math.pi / 5), math.cos(k * math.pi / 5)) for k in range(10)]
        reach = [0.022 if k % 2 == 0 else 0.009 for k in range(10)]
        shell = [(x + r * a, y + 0.7 * r * b) for r, (a, b) in zip(reach, star, strict=True)]
        pen.polygon(shell, (250, 236, 224))


def street(stage: Stage) -> None:
    """A row of fronts, a pavement and a marked road."""
    pen, rng = stage.pen, stage.rng
    sky(stage)
    tones = [(206, 186, 164), (176, 164, 160), (190, 172, 148), (160, 168, 176), (214, 204, 190)]
    x, shade = -stage.wide, 0.28 if stage.light == "dusk" else 0
    while x < stage.wide:
        width, top = rng.uniform(0.17, 0.26), stage.horizon + rng.uniform(0.16, 0.32)
        wall = mix(rng.choice(tones), (90, 50, 90), shade)
        pen.box(x, stage.horizon, x + width, top, wall)
        pen.box(x, top, x + width, top + 0.022, mix(wall, INK, 0.45))
        pane = (255, 222, 150) if shade else (112, 134, 152)
        for i in range(3):
            left = x + width * (0.12 + 0.3 * i)
            for j in range(int((top - stage.horizon) / 0.08)):
                low = top - 0.07 - 0.08 * j
                pen.box(left, low, left + width * 0.17, low + 0.045, pane)
        x += width
    stage.ground((104, 106, 112), (90, 92, 98), (76, 78, 84))
    kerb = stage.horizon - 0.05
    pen.bands(-stage.wide, stage.horizon, stage.wide, kerb, [mix((196, 192, 186), (90, 50, 90), shade)] * 2)
    pen.line([(-stage.wide, kerb), (stage.wide, kerb)], 0.012, (150, 148, 146))
    for y, dash in ((stage.horizon - 0.16, 0.1), (stage.horizon - 0.36, 0.16)):
        start = -stage.wide - rng.uniform(0, dash)
        for k in range(14):
            left = start + 2 * dash * k
            box = [(left, y), (left + dash, y), (left + dash - 0.01, y - 0.022), (left - 0.01, y - 0.022)]
            pen.polygon(box, (240, 238, 226))


def snow(stage: Stage) -> None:
    """White ground, mountains with white tops, falling flakes."""
    pen, rng = stage.pen, stage.rng
    sky(stage)
    x = -stage.wide - rng.uniform(0, 0.2)
    rock = (128, 108, 152) if stage.light == "dusk" else (124, 146, 176)
    while x < stage.wide:
        half, peak = rng.uniform(0.18, 0.3), stage.horizon + rng.uniform(0.14, 0.28)
        foot = stage.horizon - 0.02
        pen.polygon([(x - half, foot), (x, peak), (x + half, foot)], rock)
        cap, drop = 0.42, peak - foot
        rim = [(-cap, -cap), (-0.15, -0.3), (0, -cap), (0.14, -0.28), (cap, -cap)]
        pen.polygon([(x, peak)] + [(x + half * dx, peak + drop * dy) for dx, dy in rim], (248, 250, 255))
        x += half * rng.uniform(0.9, 1.3)
    stage.ground((236, 242, 252), (246, 249, 255), (222, 232, 248))
    for low, fill in ((-0.1, (226, 234, 248)), (-0.22, (240, 245, 254))):
        drift = stage.ridge(stage.horizon + low, stage.horizon + low + 0.05, rng.uniform(4, 7))
        pen.polygon(drift, mix(fill, (190, 120, 170), 0.16) if stage.light == "dusk" else fill)
    for px, py in stage.scatter(70, -stage.high, stage.high):
        r = rng.choice((0.006, 0.009, 0.012))
        pen.oval(px, py, r, r, (255, 255, 255))


def meadow(stage: Stage) -> None:
    """Rolling grass with flowers and a fence."""
    pen, rng, dusk = stage.pen, stage.rng, stage.light == "dusk"
    sky(stage)
    for low, high, fill in ((0.04, 0.13, (134, 186, 122)), (-0.01, 0.06, (152, 204, 104))):
        hill = stage.ridge(stage.horizon + low, stage.horizon + high, rng.uniform(4, 8))
        pen.polygon(hill, mix(fill, (130, 70, 100), 0.3) if dusk else fill)
    stage.ground((160, 212, 96), (134, 194, 76), (104, 168, 58))
    rail = (206, 186, 156)
    for y in (0.02, 0.05):
        height = stage.horizon + y
        pen.line([(-stage.wide, height), (stage.wide, height)], 0.008, rail)
    for k in range(int(stage.wide / 0.06) + 1):
        x = -stage.wide + 0.12 * k
        pen.line([(x, stage.horizon - 0.01), (x, stage.horizon + 0.075)], 0.016, rail)
    for x, y in stage.scatter(34, -stage.high, stage.horizon - 0.03):
        pen.line([(x - 0.008, y + 0.022), (x, y), (x + 0.008, y + 0.022)], 0.005, (84, 142, 52))
    for x, y in stage.scatter(26, -stage.high, stage.horizon - 0.04):
        r = 0.005 + 0.018 * (stage.horizon - y)
        petals = rng.choice(((255, 255, 255), (250, 190, 214), (255, 240, 150)))
        pen.oval(x, y, r * 1.25, r, petals)
        pen.oval(x, y, r * 0.45, r * 0.4, (236, 180, 60))


def city(stage: Stage) -> None:
    """Towers with lit windows over a dark wet road."""
    pen, rng = stage.pen, stage.rng
    sky(stage)
    for far in (True, False):
        x = -stage.wide - rng.uniform(0, 0.1)
        while x < stage.wide:
            width = rng.uniform(0.1, 0.17)
            top = stage.horizon + rng.uniform(0.22, 0.4) * (1.1 if far else 0.75)
            pen.box(x, stage.horizon, x + width, top, (40, 40, 84) if far else (22, 22, 50))
            for i in range(0 if far else 4):
                for j in range(int((top - stage.horizon) / 0.042)):
                    if rng.random() < 0.55:
                        px, py = x + 0.012 + i * (width - 0.02) / 4, top - 0.035 - 0.042 * j
                        lit = (255, 214, 110) if rng.random() < 0.75 else (255, 240, 190)
                        pen.box(px, py, px + 0.016, py + 0.022, lit)
            x += width * (1.5 if far else 1.12)
    stage.ground((50, 48, 84), (38, 38, 66), (28, 28, 50))
    for x, y in stage.scatter(12, stage.horizon - 0.14, stage.horizon - 0.02):
        pen.line([(x, y), (x, y - 0.05)], 0.01, (150, 124, 100))
    pen.line([(-stage.wide, stage.horizon), (stage.wide, stage.horizon)], 0.014, (96, 90, 130))
    for x in (-0.36 + rng.uniform(-0.06, 0.06), 0.36 + rng.uniform(-0.06, 0.06)):
        base = stage.horizon - 0.03
        pen.line([(x, base), (x, base + 0.3)], 0.014, (120, 116, 140))
        pen.glow(x, base + 0.31, 0.11, 0.11, (255, 226, 140), 0.9)
        pen.oval(x, base + 0.31, 0.022, 0.022, (255, 246, 210))


def sea(stage: Stage) -> None:
    """Nothing but water and sky."""
    pen = stage.pen
    sky(stage)
    stage.ground((46, 128, 190), (22, 96, 166), (10, 66, 132))
    crest = {"day": (150, 206, 236), "cloudy": (166, 192, 208), "dusk": (240, 170, 160)}[stage.light]
    waves(stage, 46, -stage.high, stage.horizon - 0.02, crest)
    pen.line([(-stage.wide, stage.horizon), (stage.wide, stage.horizon)], 0.006, (190, 224, 240))


# --- tables -----------------------------------------------------------------------------------------------

LAND = ("beach", "street", "snow", "meadow", "city")
OPEN = ("beach", "snow", "meadow", "sea")
# setting -> what a thing does there
RUNNING = dict.fromkeys(LAND, ("running", "standing"))
SITTING = dict.fromkeys(LAND, ("sitting",))
GALLOPING = dict.fromkeys(LAND, ("galloping", "standing"))
PERCHING = dict.fromkeys(LAND, ("flying", "standing")) | {"sea": ("flying",)}
STROLLING = dict.fromkeys(LAND, ("walking", "standing", "waving"))
DRIVING = dict.fromkeys(LAND, ("parked", "driving"))
SAILING = {"sea": ("sailing",), "beach": ("lying",)}
FLYING = dict.fromkeys((*LAND, "sea"), ("flying",))
FLOATING = dict.fromkeys((*LAND, "sea"), ("floating",))
BOUNCING = dict.fromkeys(LAND, ("lying", "bouncing"))
STANDING = dict.fromkeys(LAND, ("standing",))
# relation -> what a thing can be so to
FLIERS = ("kite", "balloon", "plane")
BEHIND = {"in front of": ("house", "tree"), "under": FLIERS}
BEASTS = BEHIND | {"next to": ("bench", "tree", "ball", "umbrella", "snowman")}
PEOPLE = BEHIND | {"next to": ("bench", "tree", "dog", "snowman"), "holding": ("balloon", "umbrella")}
WHEELS = BEHIND | {"next to": ("bench", "tree", "dog", "snowman")}
SMALL = BEHIND | {"next to": ("bench", "tree", "dog", "cat", "snowman")}
MOORED = {"next to": ("lighthouse",), "under": FLIERS}
ALOFT = {"above": ("house", "tree", "bench", "car", "boat")}
# company that is found in some settings only
HAUNTS = {"snowman": ("snow",), "boat": ("sea", "beach"), "lighthouse": ("sea", "beach"), "kite": OPEN}
AT_SEA = ("boat", "lighthouse", *FLIERS)


@dataclass(frozen=True)
class Kind:
    """A kind of thing: how it is named, drawn and placed. One without settings only keeps others company."""

    nouns: dict[str, int]  # how often each is used
    draw: Callable[[Pen, Paint, str], None]
    extent: tuple[float, float]  # width and height in its own units
    small: float  # its larger side as company, in shorter sides of the picture
    size: tuple[float, float] = (0, 0)  # its larger side as the main thing
    most: int = 1
    settings: dict[str, tuple[str, ...]] = field(default_factory=dict)
    company: dict[str, tuple[str, ...]] = field(default_factory=dict)
    coloured: bool = True
    garments: tuple[str, ...] = ()  # a person's colour is a garment's
    pronoun: str = "it"


KINDS: dict[str, Kind] = {
    "dog": Kind({"dog": 8, "puppy": 1, "pup": 1}, dog, (1.86, 1.06), 0.26, (0.76, 0.86), 2, RUNNING, BEASTS),
    "cat": Kind({"cat": 8, "kitten": 1, "kitty": 1}, cat, (1.04, 1.1), 0.2, (0.76, 0.86), 3, SITTING, BEASTS),
    "horse": Kind({"horse": 8, "pony": 2}, horse, (1.5, 1.52), 0.3, (0.76, 0.86), 2, GALLOPING, WHEELS),
    "bird": Kind({"bird": 9, "songbird": 1}, bird, (1.64, 1.36), 0.18, (0.76, 0.86), 3, PERCHING, ALOFT | SMALL),
    "man": Kind(
        {"man": 8, "guy": 1, "gentleman": 1},
        man,
        (0.76, 1.06),
        0.3,
        (0.76, 0.86),
        3,
        STROLLING,
        PEOPLE,
        garments=("coat", "jacket"),
        pronoun="him",
    ),
    "woman": Kind(
        {"woman": 8, "lady": 2},
        woman,
        (0.76, 1.02),
        0.3,
        (0.76, 0.86),
        3,
        STROLLING,
        PEOPLE,
        garments=("dress", "gown"),
        pronoun="her",
    ),
    "car": Kind({"car": 9, "automobile": 1, "sedan": 1}, car, (2.1, 1), 0.26, (0.76, 0.86), 2, DRIVING, WHEELS),
    "bus": Kind({"bus": 8, "double decker bus": 2}, bus, (1.5, 1), 0.3, (0.76, 0.86), 2, DRIVING, WHEELS),
    "boat": Kind({"boat": 7, "sailboat": 3}, boat, (1.32, 1), 0.26, (0.76, 0.86), 3, SAILING, MOORED),
    "plane": Kind({"plane": 6, "airplane": 3, "jet": 1}, plane, (2.2, 1), 0.26, (0.76, 0.86), 2, FLYING, ALOFT),
    "kite": Kind({"kite": 9, "paper kite": 1}, kite, (0.72, 1), 0.26, (0.76, 0.86), 3, FLYING, ALOFT),
    "balloon": Kind({"balloon": 9, "toy balloon": 1}, balloon, (0.62, 1), 0.26, (0.76, 0.86), 3, FLOATING, ALOFT),
    "ball": Kind({"ball": 9, "rubber ball": 1}, ball, (1, 1), 0.14, (0.52, 0.66), 3, BOUNCING, SMALL),
    "umbrella": Kind({"umbrella": 8, "parasol": 2}, umbrella, (1.24, 1), 0.26, (0.76, 0.86), 2, STANDING, SMALL),
    "tree": Kind({"tree": 1}, tree, (0.95, 1), 0.3, coloured=False),
    "bench": Kind({"bench": 1}, bench, (1.6, 0.85), 0.25),
    "house": Kind({"house": 4, "cottage": 1}, house, (1.12, 1), 0.3),
    "snowman": Kind({"snowman": 1}, snowman, (0.5, 1.05), 0.26, coloured=False),
    "lighthouse": Kind({"lighthouse": 1}, lighthouse, (0.78, 1), 0.3, coloured=False),
}
MAIN_KINDS = tuple(kind for kind in KINDS if KINDS[kind].settings)
SKY_ACTIONS = ("flying", "floating")


@dataclass(frozen=True)
class Setting:
    """A place: how it is painted, its words, and phrases for it on the ground and in the air."""

    draw: Callable[[Stage], None]
    words: tuple[str, ...]
    ground: dict[str, int]
    air: dict[str, int]
    lights: tuple[str, ...] = ("day", "day", "cloudy", "dusk")


SETTINGS: dict[str, Setting] = {
    "beach": Setting(
        beach,
        ("beach", "sand", "sandy", "seashore"),
        {"on the beach": 7, "on a sandy beach": 2, "on the sand": 1, "at the beach": 1},
        {"over the beach": 5, "above the beach": 2, "above a sandy beach": 1, "over the seashore": 1},
    ),
    "street": Setting(
        street,
        ("street", "road", "avenue"),
        {"on the street": 6, "on the road": 2, "in the street": 1, "on a quiet street": 1},
        {"over the street": 5, "above the street": 2, "over the road": 1, "above an avenue": 1},
    ),
    "snow": Setting(
        snow,
        ("snow", "snowy", "winter"),
        {"in the snow": 7, "on the snow": 1, "in a snowy landscape": 1, "on snowy ground": 1},
        {"over the snow": 5, "above the snow": 2, "over a snowy landscape": 1, "above a winter landscape": 1},
    ),
    "meadow": Setting(
        meadow,
        ("meadow", "field", "grass", "grassy", "pasture"),
        {"in a meadow": 5, "in a grassy field": 3, "on the grass": 2, "in a pasture": 1},
        {"over a meadow": 5, "above a meadow": 2, "over a grassy field": 2, "over a pasture": 1},
    ),
    "city": Setting(
        city,
        ("city", "night", "downtown"),
        {"in the city at night": 7, "in a city at night": 2, "downtown at night": 2},
        {"over the city at night": 7, "above the city at night": 2, "over downtown at night": 1},
        ("night",),
    ),
    "sea": Setting(
        sea,
        ("sea", "ocean", "water"),
        {"on the sea": 6, "on the ocean": 2, "on the water": 2, "out at sea": 1},
        {"over the sea": 6, "above the sea": 2, "over the ocean": 2, "over the water": 1},
    ),
}
LIGHTS = {
    "day": ("on a sunny day", "under a clear sky", "in the sunshine"),
    "cloudy": ("on a cloudy day", "under a cloudy sky"),
    "dusk": ("at sunset", "at dusk", "in the evening"),
    "night": ("under the moon", "by moonlight"),
}
ACTIONS: dict[str, tuple[tuple[str, str, str], ...]] = {  # (participle, of one, of several)
    "running": (("running", "runs", "run"),),
    "galloping": (("galloping", "gallops", "gallop"), ("running", "runs", "run")),
    "standing": (("standing", "stands", "stand"),),
    "sitting": (("sitting", "sits", "sit"),),
    "walking": (("walking", "walks", "walk"), ("strolling", "strolls", "stroll")),
    "waving": (("waving", "waves", "wave"),),
    "holding": (("holding", "holds", "hold"),),
    "flying": (("flying", "flies", "fly"),),
    "floating": (("floating", "floats", "float"), ("drifting", "drifts", "drift")),
    "parked": (("parked", "is parked", "are parked"),),
    "driving": (("driving", "drives", "drive"),),
    "sailing": (("sailing", "sails", "sail"), ("floating", "floats", "float")),
    "lying": (("lying", "lies", "lie"), ("resting", "rests", "rest")),
    "bouncing": (("bouncing", "bounces", "bounce"),),
}
# relation -> phrases before the other thing with their weights, and what follows "with <the other thing>"
RELATIONS: dict[str, tuple[dict[str, int], str]] = {
    "next to": ({"next to": 6, "beside": 2, "near": 1}, "beside {}"),
    "in front of": ({"in front of": 1}, "behind {}"),
    "above": ({"above": 3, "over": 1, "high above": 1}, "below {}"),
    "under": ({"under": 3, "below": 1, "beneath": 1}, "above {}"),
    "holding": ({"": 1}, ""),
}


# --- a scene ----------------------------------------------------------------------------------------------


def plan(rng: random.Random) -> dict:
    """What is to be seen: the ground truth that is kept beside the picture."""
    name = rng.choice(MAIN_KINDS)
    kind = KINDS[name]
    setting = rng.choice(tuple(kind.settings))
    action = rng.choice(kind.settings[setting])
    count = min(rng.choice((1, 1, 1, 1, 1, 1, 2, 3)), kind.most)
    greyscale = rng.random() < GREYSCALE_SHARE
    colour = rng.choice(tuple(COLOURS))
    others = []
    if count == 1 and rng.random() < 0.55:
        relation, company = rng.choice(_possible(kind, setting, action))
        if relation == "holding":
            action = "holding"
        other = rng.choice(company)
        hue = rng.choice([c for c in COLOURS if c != colour]) if KINDS[other].coloured else None
        hue = None if greyscale else hue
        others.append({"kind": other, "colour": hue, "relation": relation, "side": rng.choice(("left", "right"))})
    return {
        "kind": name,
        "colour": None if greyscale else colour,
        "count": count,
        "action": action,
        "setting": setting,
        "others": others,
        "light": rng.choice(SETTINGS[setting].lights),
        "greyscale": greyscale,
        "orientation": rng.choice(("landscape", "landscape", "landscape", "portrait", "portrait")),
    }


def _possible(kind: Kind, setting: str, action: str) -> list[tuple[str, tuple[str, ...]]]:
    """Relations and the company they can be had with, where the main thing is and does this."""
    options = []
    for relation, company in kind.company.items():
        if (action in SKY_ACTIONS) == (relation == "above"):
            there = tuple(
                other
                for other in company
                if setting in HAUNTS.get(other, SETTINGS) and (setting != "sea" or other in AT_SEA)
            )
            options.append((relation, there))
    return [option for option in options if option[1]]


@dataclass
class Placed:
    """One thing's place: middle and foot, in shorter sides from the centre, and pixels a unit."""

    kind: str
    colour: str | None
    action: str
    x: float
    y: float
    scale: float
    flip: bool = False


def arrange(rng: random.Random, scene: dict, horizon: float) -> list[Placed]:
    """Where the things are, the farthest first and the main ones last."""
    name, colour, action, count = scene["kind"], scene["colour"], scene["action"], scene["count"]
    kind, q = KINDS[name], HALF_SQUARE
    other = scene["others"][0] if scene["others"] else None
    relation = other["relation"] if other else None
    aloft = action in SKY_ACTIONS
    size = rng.uniform(*kind.size) * {1: 1, 2: 0.85, 3: 0.75}[count] * (0.94 if other else 1)
    scale = size / max(kind.extent)
    if count > 1:
        scale = min(scale, 2 * q / (count - OVERLAP * (count - 1)) / kind.extent[0])
    wide, high = (scale * side for side in kind.extent)
    low, top = -q, min(horizon - 0.12, q - high)
    if aloft:
        low, top = min(horizon, q - high), q - high
    elif action == "bouncing":
        low, top = -0.3, -0.2
    y = rng.uniform(low, top)
    room = (2 * q - wide) / max(1, count - 1)  # for each thing's left edge
    flip = rng.random() < 0.5
    xs = [wide / 2 - q + (i - (i > 0) * rng.uniform(0, max(0, 1 - wide / room)) / 2) * room for i in range(count)]
    if count == 1:
        xs = [rng.uniform(wide / 2 - q, q - wide / 2)]
    sway = 0.12 if aloft else 0.04
    ys = [min(max(y + (rng.uniform(-sway, sway) if i else 0), -q), q - high) for i in range(count)]
    placed = []
    if other:
        company = KINDS[other["kind"]]
        unit = company.small * rng.uniform(0.92, 1.08) / max(company.extent)
        w, h = (unit * side for side in company.extent)
        side = -1 if other["side"] == "left" else 1  # where the other thing is
        if relation == "next to":
            shrink = min(1, (2 * q + 0.06) / (wide + w))
            scale, unit, wide, w = scale * shrink, unit * shrink, wide * shrink, w * shrink
            slack = 2 * q - wide - w + 0.06
            x = -q + wide / 2 + rng.uniform(0, slack)
            ox, oy = x + wide / 2 + w / 2 - 0.06, min(ys[0] + rng.uniform(0, 0.06), horizon - 0.06)
            xs, ox = [side * x], side * ox
        elif relation == "in front of":
            xs = [-side * rng.uniform(0, max(0, min(0.12, q - wide / 2)))]
            ox = min(max(xs[0] + side * (wide * 0.3 + w * 0.4), w / 2 - q), q - w / 2)
            oy = max(ys[0] + 0.12, horizon - 0.06)
        elif relation == "holding":
            flip = side < 0
            xs = [min(max(xs[0], wide / 2 - q + 0.1), q - wide / 2 - 0.1)]
            hand = 0.6 * scale
            ox, oy = xs[0] + side * 0.34 * scale, ys[0] + hand
        else:
            shrink = min(1, (2 * q - 0.03) / (high + h))
            scale, unit, high, w, h = (length * shrink for length in (scale, unit, high, w, h))
            ox = min(max(xs[0] + side * rng.uniform(0.02, 0.2), w / 2 - q), q - w / 2)
            slack = 2 * q - high - h - 0.02
            if relation == "under":
                ys = [-q + rng.uniform(0, min(slack, 0.12))]
                oy = rng.uniform(ys[0] + high + 0.02, q - h)
            else:
                oy = -q + rng.uniform(0, min(slack, 0.04))
                ys = [max(ys[0], oy + h + 0.02)]
        pose = scene["setting"] if other["kind"] == "tree" else _pose(other, relation, scene["setting"])
        placed.append(Placed(other["kind"], other["colour"], pose, ox, oy, unit, rng.random() < 0.5))
    mains = [Placed(name, colour, action, x, y, scale, flip) for x, y in zip(xs, ys, strict=True)]
    return placed + sorted(mains, key=lambda thing: -thing.y)


def _pose(other: dict, relation: str, setting: str) -> str:
    """What the company does."""
    if other["kind"] == "boat":
        return "sailing" if setting == "sea" else "lying"
    return "flying" if relation == "under" else "standing"


def draw_thing(image: Image.Image, thing: Placed, scene: dict, paint: Paint, horizon: float) -> None:
    """One thing with its shadow and an outline that shows against the setting."""
    width, height = image.size
    shorter = min(width, height)
    kind = KINDS[thing.kind]
    x, y = width / 2 + thing.x * shorter, height / 2 - thing.y * shorter
    pen = Pen(image, x, y, thing.scale * shorter, thing.flip)
    night = scene["light"] == "night"
    floor = -0.1 if thing.action == "bouncing" else 0
    if thing.y < horizon and thing.action not in (*SKY_ACTIONS, "sailing"):
        if night:
            pen.glow(0, floor + 0.03, kind.extent[0] * 0.75, 0.17, (255, 214, 130), 0.55)
        pen.glow(0, floor + 0.01, kind.extent[0] * 0.6, 0.1, (16, 14, 36), 0.65)
    for pen.outline in (MOONLIT if night else INK, None):
        kind.draw(pen, paint, thing.action)


def paint_scene(rng: random.Random, scene: dict) -> Image.Image:
    """The picture of a plan: RGB, or mode L in greyscale; about 240 pixels on the longer side."""
    long, short = rng.choice((232, 240, 248)), rng.choice((168, 176, 180, 184, 192))
    size = (long, short) if scene["orientation"] == "landscape" else (short, long)
    image = Image.new("RGB", (size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING))
    width, height = image.size
    shorter = min(width, height)
    aloft = scene["action"] in SKY_ACTIONS
    horizon = rng.uniform(-0.14, -0.06) if aloft else rng.uniform(0.0, 0.1)
    pen = Pen(image, width / 2, height / 2, shorter)
    stage = Stage(pen, rng, scene["light"], width / shorter / 2, height / shorter / 2, horizon)
    SETTINGS[scene["setting"]].draw(stage)
    for thing in arrange(rng, scene, horizon):
        hue = thing.colour or rng.choice(tuple(COLOURS))
        paint = Paint(COLOURS[hue], rng.choice(SKINS), rng.choice(HAIRS))
        draw_thing(image, thing, scene, paint, horizon)
    image = image.reduce(SUPERSAMPLING)
    return image.convert("L") if scene["greyscale"] else image


# --- captions ---------------------------------------------------------------------------------------------


def weighted(rng: random.Random, weights: dict[str, int]) -> str:
    """One of the keys, as often as its weight says."""
    return rng.choices(tuple(weights), tuple(weights.values()))[0]


def article(words: str) -> str:
    """The words with "a" or "an" before them."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(noun: str) -> str:
    """The noun for several."""
    if noun.endswith("man"):
        return noun[:-3] + "men"
    if noun[-1] == "y" and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")


COUNTS = {2: {"two": 8, "a pair of": 1, "a couple of": 1}, 3: {"three": 8, "a group of three": 1}}
COUNT_WORDS = {2: ("two", "pair", "couple"), 3: ("three",)}


def _noun(rng: random.Random, name: str, colour: str | None, count: int) -> str:
    """The thing with its colour, without an article: "red car", "men in red coats"."""
    kind = KINDS[name]
    noun = weighted(rng, kind.nouns)
    noun = noun if count == 1 else plural(noun)
    if not colour:
        return noun
    if not kind.garments:
        return f"{colour} {noun}"
    wearing = weighted(rng, {"in": 4, "wearing": 1})
    garment = rng.choices(kind.garments, (4, 1))[0]
    if count == 1:
        return f"{noun} {wearing} {article(colour)} {garment}"
    return f"{noun} {wearing} {colour} {plural(garment)}"


# {a}: the thing with its count, {n} after "the", {bare} without article, {v}: what it does, {f}: finite,
# {be}: is or are, {r}: its relation to the other thing, {p}: the place, {l}: the light
FORMS = {
    "{a} {v}{r} {p}": 10,
    "{a} {be} {v}{r} {p}": 6,
    "{a} {v}{r} {p} {l}": 4,
    "{a} {f}{r} {p}": 2,
    "there {be} {a} {v}{r} {p}": 3,
    "the {n} {be} {v}{r} {p} {l}": 2,
    "the {n} {f}{r} {p}": 1,
    "a photo of {a} {v}{r} {p}": 2,
    "photo of {a} {v}{r} {p}": 1,
    "{p}, {a} {be} {v}{r}": 1,
    "{l}, {a} {f}{r} {p}": 1,
    "{bare} {v}{r} {p}": 1,
    "a view of {a} {v}{r} {p} {l}": 1,
}
GREY_FORMS = {
    "a black and white photo of {a} {v}{r} {p}": 8,
    "black and white photo of {a} {v}{r} {p}": 2,
    "a black and white photo shows {a} {v}{r} {p}": 2,
    "{a} {v}{r} {p} in a black and white photo": 2,
    "there {be} {a} {v}{r} {p} in this black and white photo": 1,
    "this black and white photo shows {a} {v}{r} {p}": 1,
    "an old black and white photo of {a} {v}{r} {p}": 1,
}
NO_PLACE_FORM = "a close up of {a} {v}{r} {l}"
LONGEST = 18


def _relation(rng: random.Random, scene: dict, other: dict) -> tuple[str, bool]:
    """How the main thing is to the other, and whether that goes after the place."""
    noun = article(_noun(rng, other["kind"], other["colour"], 1))
    phrases, reverse = RELATIONS[other["relation"]]
    if other["relation"] == "holding":
        return f" {noun}", False
    chance = rng.random()
    if other["relation"] == "next to" and chance < 0.12:
        return f" to the {'left' if other['side'] == 'right' else 'right'} of {noun}", False
    if chance > 0.88:
        return f" with {noun} {reverse.format(KINDS[scene['kind']].pronoun)}", True
    return f" {weighted(rng, phrases)} {noun}", False


def _caption(rng: random.Random, scene: dict, form: str, colour: str | None, place_first: bool = True) -> str:
    """One sentence in this form."""
    count, setting = scene["count"], SETTINGS[scene["setting"]]
    noun = _noun(rng, scene["kind"], colour, count)
    number = "" if count == 1 else weighted(rng, COUNTS[count])
    participle, of_one, of_several = rng.choices(ACTIONS[scene["action"]], (4, 1)[: len(ACTIONS[scene["action"]])])[0]
    if count > 1 and rng.random() < 0.15:
        participle += " side by side" if count == 2 else " in a row"
    relation, after = "", False
    if scene["others"] and (scene["action"] == "holding" or rng.random() < 0.85):
        relation, after = _relation(rng, scene, scene["others"][0])
    aloft = scene["action"] in SKY_ACTIONS and not (relation and not after)
    place = weighted(rng, setting.air if aloft else setting.ground)
    if after:
        form = form.replace("{r}", "").replace("{p}", "{p}{r}") if "{p}," not in form else form
    parts = {
        "a": f"{number} {noun}" if number else article(noun),
        "n": f"{COUNT_WORDS[count][0]} {noun}" if number else noun,
        "bare": f"{COUNT_WORDS[count][0]} {noun}" if number else noun,
        "v": participle,
        "f": of_one if count == 1 else of_several,
        "be": "is" if count == 1 else "are",
        "r": relation,
        "p": place,
        "l": rng.choice(LIGHTS[scene["light"]]),
    }
    caption = form.format(**parts)
    if len(caption.split()) > LONGEST and form.endswith(" {l}"):
        caption = form[: -len(" {l}")].format(**parts)
    return caption[0].upper() + caption[1:] + "."


def describe(rng: random.Random, scene: dict) -> list[str]:
    """Five different captions. At most one leaves out the colour and at most one the setting."""
    forms = GREY_FORMS if scene["greyscale"] else FORMS
    captions: list[str] = []
    without_colour = 1 if rng.random() < 0.3 else None
    without_place = 3 if rng.random() < 0.1 and not scene["greyscale"] else None
    left = dict(forms)
    while len(captions) < 5:
        form = weighted(rng, left)
        colour = scene["colour"]
        if len(captions) == without_colour and "bare" not in form:
            colour = None
        if len(captions) == without_place:
            form = NO_PLACE_FORM
        caption = _caption(rng, scene, form, colour)
        if caption not in captions and len(caption.split()) <= LONGEST:
            captions.append(caption)
            left.pop(form, None)
    return captions


def _any_of(words: list[str] | tuple[str, ...]) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


def _nouns(name: str) -> list[str]:
    return [word for noun in KINDS[name].nouns for word in (noun, plural(noun))]


def _plain(caption: str) -> str:
    """Its words alone; in "black and white" no colour is named."""
    return re.sub(r"\bblack and white\b", "grey", " ".join(re.findall(r"[a-z]+", caption.lower())))


def _named(words: str, text: str) -> bool:
    return re.search(rf"\b{words}\b", text) is not None


def subject(caption: str) -> tuple[str | None, str | None]:
    """The thing that a caption names first, which it is about, and the colour that it gives it; None for neither."""
    text = _plain(caption)
    first = re.search(rf"\b{_any_of(tuple(noun for name in KINDS for noun in _nouns(name)))}\b", text)
    if not first:
        return None, None
    name = next(name for name in KINDS if first[0] in _nouns(name))
    colours = _any_of(tuple(COLOURS))
    if KINDS[name].garments:
        colour = re.match(rf" (?:in|wearing|dressed in) (?:an? |the )?({colours})\b", text[first.end() :])
    else:
        colour = re.search(rf"\b({colours}) $", text[: first.start()])
    return name, colour[1] if colour else None


def check(caption: str, scene: dict) -> dict[str, bool]:
    """Whether a caption says what is to be seen in a scene, by this module's own words.

    thing: its subject is the main thing. colour: it gives its subject the main thing's colour. setting: it names
    the right setting and no other. count: it names the main thing, in the right number. company: it names no
    kind of thing that is not there (as CHAIR does, arXiv 1809.02156). relation: it puts the main thing to the
    other thing as they are. What a scene does not have (a colour in greyscale, a relation without another
    thing) is left out.
    """
    text = _plain(caption)
    name, count, others = scene["kind"], scene["count"], scene["others"]
    thing, colour = subject(caption)
    right = {"thing": thing == name}
    if scene["colour"]:
        right["colour"] = colour == scene["colour"]
    places = {place for place, setting in SETTINGS.items() if _named(_any_of(setting.words), text)}
    right["setting"] = places == {scene["setting"]}
    numbers = {number for number, words in COUNT_WORDS.items() if _named(_any_of(words), text)}
    form = _any_of([noun if count == 1 else plural(noun) for noun in KINDS[name].nouns])
    right["count"] = numbers == ({count} if count > 1 else set()) and _named(form, text)
    present = {name, *(other["kind"] for other in others)}
    right["company"] = not any(_named(_any_of(_nouns(kind)), text) for kind in KINDS if kind not in present)
    if others:
        right["relation"] = thing == name and _names_relation(text, others[0])
    return right


def _names_relation(text: str, other: dict) -> bool:
    """Whether the text puts the main thing to the other thing as they are."""
    phrases, reverse = RELATIONS[other["relation"]]
    before = ["holding", "holds", "hold"] if other["relation"] == "holding" else list(phrases)
    if other["relation"] == "next to":
        before.append(f"to the {'left' if other['side'] == 'right' else 'right'} of")
    company = rf"(?:an? |the )?(?:{_any_of(tuple(COLOURS))} )?{_any_of(_nouns(other['kind']))}"
    if _named(rf"{_any_of(before)} {company}", text):
        return True
    return bool(reverse) and _named(rf"with {company} {reverse.format('(?:it|him|her|them)')}", text)


# --- the data set -----------------------------------------------------------------------------------------


def draw_scene(rng: random.Random) -> tuple[Image.Image, dict, list[str]]:
    """One picture (RGB, or L in greyscale), its ground truth and five captions, all from `rng`."""
    scene = plan(rng)
    return paint_scene(rng, scene), scene, describe(rng, scene)


def _draw_picture(folder: Path, seed: int, split: str, index: int) -> tuple[dict, list[dict]]:
    """Write one picture; return its entries in the annotation file."""
    image, scene, captions = draw_scene(random.Random(f"{seed}/{split}/{index}"))
    image_id = SPLITS.index(split) * PICTURES_AT_MOST + index + 1
    name = f"{image_id:012d}.jpg"
    image.save(folder / "images" / split / name, quality=90)
    width, height = image.size
    entry = {
        "id": image_id,
        "file_name": name,
        "width": width,
        "height": height,
        "license": 1,
        "scene": scene,
    }
    notes = [{"id": image_id * 10 + k, "image_id": image_id, "caption": text} for k, text in enumerate(captions)]
    return entry, notes


def _draw_pictures(folder: Path, seed: int, jobs: list[tuple[str, int]]) -> list[tuple[dict, list[dict]]]:
    return [_draw_picture(folder, seed, split, index) for split, index in jobs]


def _drawn(folder: Path) -> list[dict | None]:
    """The "info" of the folder's annotation files, None for one that is missing or no scenes file."""
    infos: list[dict | None] = []
    for name in (*(f"captions_{split}" for split in SPLITS), "image_info_test"):
        try:
            with open(folder / "annotations" / f"{name}.json", encoding="utf-8") as file:
                info = json.load(file)["info"]
            infos.append(info if "scenes" in info else None)
        except (OSError, ValueError, KeyError, TypeError):
            infos.append(None)
    return infos


def draw_dataset(folder: str | Path, train: int = 4000, val: int = 500, test: int = 500, seed: int = 0) -> Path:
    """Draw the sample data set into a folder, laid out as COCO is; return the folder.

    A folder that already holds the same data set is left as it is; one that holds scenes drawn otherwise is
    drawn anew. The folder is filled when everything is drawn, so one that was interrupted holds no data set.

    Raises:
        InputError: a number is negative or too large, or the folder holds something else.
    """
    folder, counts = Path(folder), {"train": train, "val": val, "test": test}
    for split, count in counts.items():
        if not 0 <= count <= PICTURES_AT_MOST:
            raise InputError(f"--{split} {count}: choose a number from 0 to {PICTURES_AT_MOST}.")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; name a folder for the data set.")
    partial_folder = folder / ".partial-scenes"
    info = {
        "description": "Drawn scenes with five captions each",
        "version": VERSION,
        "scenes": {"counts": counts, "seed": seed, "version": VERSION},
    }
    if folder.is_dir():
        infos = _drawn(folder)
        if all(found == info for found in infos):
            return folder
        if not any(infos) and any(path != partial_folder for path in folder.iterdir()):
            raise InputError(f"{folder} holds something other than drawn scenes; name an empty or a new folder.")
    shutil.rmtree(partial_folder, ignore_errors=True)
    for split in SPLITS:
        (partial_folder / "images" / split).mkdir(parents=True)
    jobs = [(split, index) for split in SPLITS for index in range(counts[split])]
    chunks = [jobs[i : i + 50] for i in range(0, len(jobs), 50)]
    draw = partial(_draw_pictures, partial_folder, seed)
    pictures = []
    with tqdm(total=len(jobs), desc="drawing", unit="picture", disable=None) as bar:
        if len(jobs) <= ALONE_AT_MOST:
            for chunk in chunks:
                pictures += draw(chunk)
                bar.update(len(chunk))
        else:
            # not forked: the caller may have started torch's threads
            with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
                for done in pool.map(draw, chunks):
                    pictures += done
                    bar.update(len(done))
    _write_annotations(partial_folder / "annotations", info, jobs, pictures)
    for name in ("annotations", "images"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
    for name in ("images", "annotations"):
        os.replace(partial_folder / name, folder / name)
    partial_folder.rmdir()
    return folder


def _write_annotations(
    folder: Path, info: dict, jobs: list[tuple[str, int]], pictures: list[tuple[dict, list[dict]]]
) -> None:
    """The annotation files of all splits."""
    folder.mkdir()
    licenses = [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
    for split in SPLITS:
        mine = [picture for (of, _), picture in zip(jobs, pictures, strict=True) if of == split]
        images = {"info": info, "licenses": licenses, "images": [entry for entry, _ in mine]}
        captions = images | {"annotations": [note for _, notes in mine for note in notes]}
        files = {f"captions_{split}": captions} | ({"image_info_test": images} if split == "test" else {})
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def main(
    out: Annotated[Path, tyro.conf.Positional],
    train: int = 4000,
    val: int = 500,
    test: int = 500,
    seed: int = 0,
) -> None:
    """Draw the sample data set: pictures with five captions each, laid out as COCO is.

    Args:
        out: the folder to draw into.
        train: pictures to train on.
        val: pictures to choose a model with.
        test: pictures to measure the final model on.
        seed: the same seed draws the same pictures.
    """
    folder = draw_dataset(out, train, val, test, seed)
    print(f"{folder}: {train} pictures to train on, {val} to validate, {test} to test, five captions each.")


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
