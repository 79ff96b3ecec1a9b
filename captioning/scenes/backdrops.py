"""Paint the settings of scenes, one function per setting."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from captioning.scenes.drawing import INK, WOOD, Colour, Pen, Point, mix


@dataclass
class Stage:
    """The surface of a setting; x and y are in units of the image's shorter side from its centre, y upwards."""

    pen: Pen
    rng: random.Random
    light: str
    wide: float  # half the width
    high: float  # half the height
    horizon: float

    def ground(self, *colours: Colour) -> None:
        """Paint everything below the horizon, in the light of the scene."""
        tint, share = {"dusk": ((150, 70, 110), 0.2), "cloudy": ((130, 140, 150), 0.16)}.get(self.light, ((0, 0, 0), 0))
        shades = [mix(colour, tint, share) for colour in colours]
        self.pen.bands(-self.wide, self.horizon, self.wide, -self.high, shades)

    def scatter(self, count: int, low: float, high: float) -> Iterator[Point]:
        """Yield random points between two heights, over the whole width."""
        return ((self.rng.uniform(-self.wide, self.wide), self.rng.uniform(low, high)) for _ in range(count))

    def ridge(self, low: float, high: float, waves: float) -> list[Point]:
        """Return a wavy skyline between two heights, closed at the bottom."""
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
    """Paint the sky with what belongs to its light: sun, clouds, moon and stars."""
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
    """Paint short curved crests of waves."""
    for x, y in stage.scatter(count, low, high):
        w = 0.03 + 0.12 * (high - y)
        stage.pen.line([(x - w, y - 0.006), (x, y + 0.006), (x + w, y - 0.006)], 0.007, fill)


def beach(stage: Stage) -> None:
    """Paint sand, surf and a strip of water."""
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
    """Paint a row of house fronts, a pavement and a road with markings."""
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
    """Paint white ground, mountains with white tops and falling flakes."""
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
    """Paint hilly grass with flowers and a fence."""
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
    """Paint towers with lit windows over a dark wet road."""
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
    """Paint water and sky only."""
    pen = stage.pen
    sky(stage)
    stage.ground((46, 128, 190), (22, 96, 166), (10, 66, 132))
    crest = {"day": (150, 206, 236), "cloudy": (166, 192, 208), "dusk": (240, 170, 160)}[stage.light]
    waves(stage, 46, -stage.high, stage.horizon - 0.02, crest)
    pen.line([(-stage.wide, stage.horizon), (stage.wide, stage.horizon)], 0.006, (190, 224, 240))


BACKDROPS: dict[str, Callable[[Stage], None]] = {
    "beach": beach,
    "street": street,
    "snow": snow,
    "meadow": meadow,
    "city": city,
    "sea": sea,
}
