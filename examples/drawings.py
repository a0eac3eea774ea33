"""Draws synthetic product images of ten categories.

Every object is drawn in coordinates 0..100 (x to the right, y down) on a transparent square and then
rotated, scaled and placed on a background (`scenes`). All categories use the same palette, so they differ
only in shape.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi, sin

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Point = tuple[float, float]
Box = tuple[float, float, float, float]

CANVAS_PIXELS = 256
OUTLINE_PIXELS = 2
CLEAR = (255, 255, 255, 0)  # transparent white, so that soft edges do not become darker

PALETTE: dict[str, Color] = {
    "red": (200, 45, 50),
    "orange": (228, 130, 40),
    "yellow": (235, 200, 60),
    "green": (60, 150, 75),
    "teal": (35, 150, 150),
    "blue": (50, 95, 185),
    "violet": (125, 75, 170),
    "pink": (230, 130, 165),
    "brown": (130, 85, 55),
    "gray": (130, 135, 140),
    "black": (45, 45, 50),
    "cream": (240, 228, 200),
}


@dataclass(frozen=True, slots=True)
class Paint:
    """The colors of one image: body and trim of the object, outline and background."""

    name: str
    body: Color
    trim: Color
    ink: Color
    ground: Color


def mix(first: Color, second: Color, share: float) -> Color:
    """Interpolate linearly from `first` (share 0) to `second` (share 1)."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def choose_paint(rng: np.random.Generator) -> Paint:
    """Choose three different palette colors and make the background lighter or darker."""
    body, trim, ground = rng.choice(sorted(PALETTE), size=3, replace=False)
    ground_end = (255, 255, 255) if rng.random() < 0.7 else (20, 20, 28)
    return Paint(
        name=str(body),
        body=PALETTE[body],
        trim=PALETTE[trim],
        ink=mix(PALETTE[body], (10, 10, 15), 0.75),
        ground=mix(PALETTE[ground], ground_end, rng.uniform(0.35, 0.85)),
    )


class Pen:
    """Draws filled shapes with an outline on a transparent square, in coordinates 0..100."""

    def __init__(self, ink: Color) -> None:
        self.image = Image.new("RGBA", (CANVAS_PIXELS, CANVAS_PIXELS), CLEAR)
        self._draw = ImageDraw.Draw(self.image)
        self._ink = ink

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        """Draw a filled polygon."""
        self._draw.polygon(
            [self._to_pixels(point) for point in points], fill=fill, outline=self._ink, width=OUTLINE_PIXELS
        )

    def ellipse(self, box: Box, fill: Color) -> None:
        """Draw a filled ellipse inside the box (left, top, right, bottom)."""
        self._draw.ellipse(self._corners(box), fill=fill, outline=self._ink, width=OUTLINE_PIXELS)

    def box(self, box: Box, fill: Color, radius: float = 2) -> None:
        """Draw a filled rectangle with rounded corners."""
        corners = self._corners(box)
        self._draw.rounded_rectangle(
            corners, radius * CANVAS_PIXELS / 100, fill=fill, outline=self._ink, width=OUTLINE_PIXELS
        )

    def line(self, points: Sequence[Point], color: Color, width: float) -> None:
        """Draw a line through the points; `width` has the same unit as the coordinates."""
        pixels = [self._to_pixels(point) for point in points]
        self._draw.line(pixels, fill=color, width=round(width * CANVAS_PIXELS / 100), joint="curve")

    def arc(self, box: Box, degrees: tuple[float, float], color: Color, width: float) -> None:
        """Draw an arc of an ellipse between two angles in degrees, clockwise from three o'clock."""
        self._draw.arc(self._corners(box), *degrees, fill=color, width=round(width * CANVAS_PIXELS / 100))

    def _to_pixels(self, point: Point) -> Point:
        return point[0] * CANVAS_PIXELS / 100, point[1] * CANVAS_PIXELS / 100

    def _corners(self, box: Box) -> list[Point]:
        return [self._to_pixels(box[:2]), self._to_pixels(box[2:])]


def draw_mug(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A cup with a handle."""
    top, right = rng.uniform(18, 32), rng.uniform(60, 70)
    pen.arc((right - 18, top + 14, right + 24, 78), (-100, 100), paint.ink, 9)
    pen.arc((right - 16, top + 16, right + 22, 76), (-100, 100), paint.body, 5)
    pen.box((14, top, right, 90), paint.body, radius=rng.uniform(2, 10))
    pen.ellipse((14, top - 7, right, top + 7), mix(paint.body, (0, 0, 0), 0.3))
    if rng.random() < 0.6:
        pen.box((14, 50, right, 50 + rng.uniform(6, 20)), paint.trim, radius=0)


def draw_lamp(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A lamp shade on a stem with a foot."""
    shade_bottom, half_top, half_bottom = rng.uniform(40, 52), rng.uniform(10, 18), rng.uniform(28, 38)
    pen.box((47, shade_bottom, 53, 90), paint.trim, radius=0)
    foot = rng.uniform(16, 26)
    pen.ellipse((50 - foot, 84, 50 + foot, 95), paint.trim)
    shade = [
        (50 - half_top, 8),
        (50 + half_top, 8),
        (50 + half_bottom, shade_bottom),
        (50 - half_bottom, shade_bottom),
    ]
    pen.polygon(shade, paint.body)
    if rng.random() < 0.5:
        pen.line([(66, shade_bottom), (66, shade_bottom + 14)], paint.ink, 1.2)


def draw_chair(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A back with slats, a seat and four legs."""
    seat, leg = rng.uniform(50, 60), rng.uniform(3.5, 6)
    for x, bottom in ((24, 94), (72, 94), (36, 84), (84, 84)):
        pen.box((x, seat, x + leg, bottom), mix(paint.body, (0, 0, 0), 0.25), radius=0)
    for x in (36, 84):
        pen.box((x, 6, x + leg, seat), paint.body, radius=1)
    slats = int(rng.integers(2, 5))
    for slat in range(slats):
        top = 9 + slat * (seat - 14) / slats
        pen.box((36, top, 84 + leg, top + 16 / slats), paint.body, radius=1)
    pen.polygon([(20, seat + 7), (78, seat + 7), (92, seat - 3), (35, seat - 3)], paint.trim)


def draw_bottle(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A slim body with shoulders, a neck, a cap and a label."""
    half, shoulder = rng.uniform(13, 20), rng.uniform(34, 46)
    pen.polygon(
        [(44, 14), (56, 14), (56, 26), (50 + half, shoulder), (50 - half, shoulder), (44, 26)], paint.body
    )
    pen.box((50 - half, shoulder - 2, 50 + half, 95), paint.body, radius=4)
    pen.box((43, 5, 57, 14), paint.trim, radius=1)
    pen.box((50 - half, 55, 50 + half, rng.uniform(70, 84)), mix(paint.trim, (255, 255, 255), 0.5), radius=0)


def draw_umbrella(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """An open canopy with scallops, a shaft and a hook."""
    pen.line([(50, 8), (50, 86)], paint.ink, 3)
    hook = 1 if rng.random() < 0.5 else -1
    pen.arc((50 - (hook < 0) * 16, 78, 50 + (hook > 0) * 16, 94), (0, 180), paint.ink, 4)
    rim, panels = rng.uniform(46, 54), int(rng.integers(4, 7))
    dome = [(50 - 44 * cos(pi * i / 24), rim - (rim - 12) * sin(pi * i / 24)) for i in range(25)]
    scallops = [(94 - 88 * i / 60, rim - 7 * abs(sin(panels * pi * i / 60))) for i in range(61)]
    pen.polygon(dome + scallops, paint.body)
    for panel in range(1, panels):
        pen.line([(50, 12), (6 + 88 * panel / panels, rim)], paint.trim, 1.5)


def draw_book(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A closed book with its spine, its pages and a title."""
    left, right, depth = rng.uniform(18, 26), rng.uniform(68, 76), rng.uniform(6, 12)
    pen.polygon(
        [(left, 84), (right, 84), (right + depth, 84 + depth), (left + depth, 84 + depth)], (245, 240, 225)
    )
    pen.polygon(
        [(right, 10), (right + depth, 10 + depth), (right + depth, 84 + depth), (right, 84)], (245, 240, 225)
    )
    pen.box((left, 10, right, 84), paint.body, radius=1)
    pen.box((left, 10, left + 8, 84), mix(paint.body, (0, 0, 0), 0.3), radius=1)
    for line in range(int(rng.integers(2, 4))):
        pen.box((left + 14, 20 + 9 * line, right - rng.uniform(6, 16), 24 + 9 * line), paint.trim, radius=0)
    if rng.random() < 0.5:
        pen.ellipse((left + 18, 54, left + 36, 72), paint.trim)


def draw_backpack(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A bag with rounded shoulders, a handle, a pocket and two side straps."""
    top, pocket = rng.uniform(16, 22), rng.uniform(54, 62)
    pen.arc((38, 4, 62, 30), (180, 360), paint.ink, 4)
    for left in (9, 77):
        pen.box((left, 46, left + 14, 86), mix(paint.body, (0, 0, 0), 0.3), radius=6)
    pen.box((18, top, 82, 94), paint.body, radius=rng.uniform(18, 26))
    pen.line([(26, 46), (74, 46)], paint.ink, 2)
    pen.box((28, pocket, 72, 88), paint.trim, radius=6)
    pen.line([(32, pocket + 8), (68, pocket + 8)], paint.ink, 1.5)
    pen.box((47, pocket + 7, 52, pocket + 16), paint.ink, radius=1)


def draw_clock(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A round face with hour marks and two hands, with or without feet."""
    if rng.random() < 0.5:
        pen.line([(30, 78), (20, 95)], paint.ink, 5)
        pen.line([(70, 78), (80, 95)], paint.ink, 5)
    rim = rng.uniform(5, 10)
    pen.ellipse((10, 10, 90, 90), paint.body)
    pen.ellipse((10 + rim, 10 + rim, 90 - rim, 90 - rim), mix(paint.trim, (255, 255, 255), 0.8))
    for hour in range(12):
        x, y = sin(hour * pi / 6), cos(hour * pi / 6)
        pen.line([(50 + 25 * x, 50 + 25 * y), (50 + 29 * x, 50 + 29 * y)], (30, 30, 35), 2)
    for reach, width in ((16, 4), (24, 2.5)):
        angle = rng.uniform(0, 2 * pi)
        pen.line([(50, 50), (50 + reach * sin(angle), 50 - reach * cos(angle))], (30, 30, 35), width)


def draw_plant(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """Leaves on stems above a flower pot."""
    leaf = mix(paint.trim, (40, 140, 60), rng.uniform(0.2, 0.8))
    for angle in np.linspace(-1.1, 1.1, int(rng.integers(4, 8))):
        reach = rng.uniform(34, 48)
        tip = (50 + reach * sin(angle), 62 - reach * cos(angle))
        pen.line([(50, 66), tip], mix(leaf, (0, 0, 0), 0.4), 2)
        side = (rng.uniform(6, 10) * cos(angle), rng.uniform(6, 10) * sin(angle))
        middle = (50 + 0.65 * reach * sin(angle), 62 - 0.65 * reach * cos(angle))
        pen.polygon([(50, 62), (middle[0] + side[0], middle[1] + side[1]), tip,
                     (middle[0] - side[0], middle[1] - side[1])], leaf)  # fmt: skip
    pen.polygon([(32, 66), (68, 66), (62, 95), (38, 95)], paint.body)
    pen.box((28, 61, 72, 70), paint.body, radius=1)


def draw_sneaker(pen: Pen, paint: Paint, rng: np.random.Generator) -> None:
    """A low shoe from the side with upper, sole and laces."""
    collar, toe = rng.uniform(28, 38), rng.uniform(50, 58)
    pen.polygon(
        [(8, 72), (9, collar), (22, collar + 6), (36, collar - 2), (58, toe), (82, toe + 5), (93, 72)],
        paint.body,
    )
    pen.polygon([(70, 72), (76, toe + 4), (86, toe + 7), (93, 72)], paint.trim)
    pen.box((5, 70, 95, 70 + rng.uniform(8, 13)), mix(paint.trim, (255, 255, 255), 0.75), radius=4)
    for lace in range(4):
        x, y = 40 + 6 * lace, collar + 4 + (toe - collar) * lace / 4.2
        pen.line([(x - 4, y + 9), (x + 4, y)], (250, 250, 250), 2)
    pen.line([(20, 64), (34, 52), (50, 66)], paint.trim, rng.uniform(2, 5))


CATEGORIES: dict[str, Callable[[Pen, Paint, np.random.Generator], None]] = {
    "backpack": draw_backpack,
    "book": draw_book,
    "bottle": draw_bottle,
    "chair": draw_chair,
    "clock": draw_clock,
    "lamp": draw_lamp,
    "mug": draw_mug,
    "plant": draw_plant,
    "sneaker": draw_sneaker,
    "umbrella": draw_umbrella,
}
