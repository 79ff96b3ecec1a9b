"""Draw the things in scenes, one function per kind."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from captioning.scenes.drawing import BEAK, GLASS, INK, MOONLIT, ROSE, TYRE, WOOD, Colour, Paint, Pen, at, mix, smooth


def legs(pen: Pen, hips: float, feet: dict[float, float], width: float, fill: Colour, hoof: Colour) -> None:
    """Draw legs; `feet` maps each leg's x to how far its foot is thrown forward, which also lifts it."""
    for x, throw in feet.items():
        foot = (x + throw, 0.03 + abs(throw) * 0.4)
        knee = (x + throw * 0.7, hips * 0.55 + 0.02)
        pen.line([(x, hips), knee, foot], width, fill)
        pen.oval(foot[0] + 0.02, foot[1], width * 0.62, width * 0.42, hoof)


def dog(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a dog with a large head, a floppy ear, a raised tail and short legs."""
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
    """Draw a sitting cat that faces us, with pointed ears, whiskers and a curled tail."""
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
    """Draw a horse with an upright neck, a mane, a saddle, long thin legs and a hanging tail."""
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
    """Draw a bird, flying with both wings up or standing on two thin legs."""
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
    """Draw a man in a coat, trousers and a hat, or a woman with long hair in a wide dress."""
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
    """Draw a long, low car with a round roof."""
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
    """Draw a tall bus with two rows of windows."""
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
    """Draw a hull under two sails."""
    pen.line([(0, 0.2), (0, 1)], 0.035, WOOD)
    pen.polygon([(0.05, 0.3), (0.05, 0.97), (0.54, 0.3)], paint.base)
    pen.polygon([(-0.05, 0.32), (-0.05, 0.86), (-0.44, 0.32)], paint.light)
    pen.polygon(at("-58,24 64,24 44,1 -42,1"), paint.base)
    pen.patch(at("-58,24 64,24 60,18 -54,18"), paint.dark)
    if action == "sailing" and not pen.outline:
        for x in (-0.5, -0.2, 0.1, 0.4):
            pen.oval(x, 0, 0.17, 0.025, (240, 248, 255))


def plane(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a plane from the side, with a tail fin, swept wings, a row of windows and two trails."""
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
    """Draw a diamond with a tail of bows."""
    tail = at("0,24 6,17 -5,9 0,1")
    pen.line(tail, 0.022, INK)
    for x, y in tail[1:3]:
        pen.polygon([(x, y), (x - 0.09, y + 0.045), (x - 0.09, y - 0.045)], paint.base)
        pen.polygon([(x, y), (x + 0.09, y + 0.045), (x + 0.09, y - 0.045)], paint.dark)
    pen.polygon(at("0,100 42,66 0,20 -42,66"), paint.base)
    pen.patch([(0, 1), (0.42, 0.66), (0, 0.66)], paint.light)
    pen.patch([(0, 0.66), (0, 0.2), (-0.42, 0.66)], paint.dark)


def balloon(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a pear-shaped balloon on a string."""
    if pen.outline:  # a single thin line in the outline's colour shows everywhere
        pen.draw.line(pen.place(smooth("0,40 4,28 -4,14 0,0 -4,14 4,28")), pen.outline, round(pen.edge))
    pen.polygon([(0, 0.42), (0.06, 0.35), (-0.06, 0.35)], paint.dark)
    pen.polygon(smooth("0,100 20,95 30,76 20,54 0,40 -20,54 -30,76 -20,95"), paint.base)
    pen.patch(smooth("10,96 26,76 12,52 20,74"), paint.dark)
    pen.detail(-0.12, 0.84, 0.06, 0.085, mix(paint.base, (255, 255, 255), 0.65))


def ball(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a round ball with panels."""
    panel = (190, 194, 204) if min(paint.base) > 240 else (252, 252, 252)
    pen.oval(0, 0.5, 0.5, 0.5, paint.base)
    pen.patch(smooth("-10,97 8,50 -10,3 -24,50"), panel)
    pen.patch(smooth("26,90 44,60 40,26 30,50"), panel)
    pen.patch(smooth("-32,86 -48,50 -32,14 -40,50"), panel)
    pen.detail(0.16, 0.78, 0.09, 0.06, mix(paint.base, (255, 255, 255), 0.6))


RIM = [(0.6 - 0.3 * (i + t / 4), 0.5 + 0.07 * math.sin(math.pi * t / 4)) for i in range(4) for t in range(4)]
DOME = [(0.62 * math.cos(a / 12 * math.pi), 0.5 + 0.44 * math.sin(a / 12 * math.pi)) for a in range(13)]


def umbrella(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a scalloped dome on a hooked stick."""
    pen.line([(0, 0.94), (0, 0.99)], 0.03, WOOD)
    pen.line(at("0,60 0,6 5,2 11,2 15,8"), 0.04, WOOD)
    pen.polygon(DOME + RIM[::-1], paint.base)
    pen.patch(smooth("0,94 26,74 30,52 15,56 0,52 4,74"), paint.dark)
    pen.patch(
        smooth("0,94 -42,80 -60,52 -45,56 -30,52 -22,74"),
        paint.dark,
    )


def tree(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a palm on the beach, a pine in the snow, else a tree with a round crown; `action` is the setting."""
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
    """Draw slats on two legs."""
    for x in (-0.6, 0.6):
        pen.line([(x, 0.02), (x, 0.6)], 0.07, TYRE)
    for y in (0.3, 0.52, 0.7):
        pen.box(-0.78, y, 0.78, y + 0.12, paint.base)


def house(pen: Pen, paint: Paint, action: str) -> None:
    """Draw walls under a steep roof."""
    pen.polygon(at("24,70 24,98 36,98 36,66"), (150, 96, 84))
    pen.box(-0.45, 0, 0.45, 0.58, paint.base)
    pen.polygon([(-0.56, 0.55), (0.56, 0.55), (0.0, 1)], (112, 84, 80))
    pen.box(-0.1, 0, 0.1, 0.32, WOOD)
    for x in (-0.3, 0.3):
        pen.box(x - 0.09, 0.22, x + 0.09, 0.42, (255, 238, 170))


def snowman(pen: Pen, paint: Paint, action: str) -> None:
    """Draw three balls of snow, a carrot and a hat."""
    for y, r in ((0.22, 0.25), (0.55, 0.19), (0.8, 0.14)):
        pen.oval(0, y, r, r * 0.95, (250, 252, 255))
    pen.polygon([(0.03, 0.82), (0.24, 0.78), (0.03, 0.77)], BEAK)
    pen.polygon(at("-10,90 10,90 9,104 -9,104"), INK)
    for x, y in ((-0.05, 0.85), (0.05, 0.85), (0, 0.6), (0, 0.5)):
        pen.detail(x, y, 0.02, 0.02, INK)


def lighthouse(pen: Pen, paint: Paint, action: str) -> None:
    """Draw a striped tower on a rock."""
    pen.polygon(smooth("-34,0 -20,14 18,16 36,0"), (120, 116, 120))
    pen.polygon(at("-16,12 16,12 10,74 -10,74"), (250, 248, 244))
    for y, half in ((0.24, 0.148), (0.48, 0.125)):
        pen.patch([(-half, y), (half, y), (half - 0.012, y + 0.12), (0.012 - half, y + 0.12)], (196, 84, 80))
    pen.box(-0.09, 0.74, 0.09, 0.86, (255, 240, 160))
    pen.polygon([(-0.13, 0.86), (0.13, 0.86), (0, 1)], (196, 84, 80))


THINGS: dict[str, Callable[[Pen, Paint, str], None]] = {
    "dog": dog,
    "cat": cat,
    "horse": horse,
    "bird": bird,
    "man": man,
    "woman": woman,
    "car": car,
    "bus": bus,
    "boat": boat,
    "plane": plane,
    "kite": kite,
    "balloon": balloon,
    "ball": ball,
    "umbrella": umbrella,
    "tree": tree,
    "bench": bench,
    "house": house,
    "snowman": snowman,
    "lighthouse": lighthouse,
}
