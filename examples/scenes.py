"""Composes an image: an object of `drawings`, rotated and scaled, in front of a background."""

from dataclasses import dataclass

import numpy as np
from drawings import CATEGORIES, Color, Paint, Pen, choose_paint, mix
from PIL import Image, ImageChops, ImageDraw, ImageOps

SHORTEST_PIXELS, LONGEST_PIXELS = 160, 640
MAX_ROTATION_DEGREES = 20.0
NOISE_TILE_PIXELS = 160


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn image and the name of its object's color."""

    image: Image.Image
    color_name: str


def draw_scene(category: str, rng: np.random.Generator, transparent: bool) -> Scene:
    """Draw an RGB image of `category`, or an RGBA image without a background if `transparent`."""
    paint = choose_paint(rng)
    size = _choose_size(rng)
    cutout = _draw_object(category, paint, rng)
    scale = rng.uniform(0.6, 0.92) * min(size) / max(cutout.size)
    cutout = cutout.resize(
        (round(cutout.width * scale), round(cutout.height * scale)), Image.Resampling.BILINEAR
    )
    corner = _place_near_the_center(size, cutout.size, rng)
    if transparent:
        image = Image.new("RGBA", size, (255, 255, 255, 0))
        image.alpha_composite(cutout, corner)
        return Scene(image, paint.name)
    image = _draw_background(size, paint, rng)
    image.paste(cutout, corner, cutout)
    return Scene(_add_noise(image, rng), paint.name)


def _choose_size(rng: np.random.Generator) -> tuple[int, int]:
    """Choose width and height from a log-uniform distribution.

    The aspect ratio is at most 4:3, because otherwise the center crop could miss the object.
    """
    width, height = (
        np.exp(rng.uniform(np.log(SHORTEST_PIXELS), np.log(LONGEST_PIXELS), 2)).astype(int).tolist()
    )
    return min(width, height * 4 // 3), min(height, width * 4 // 3)


def _draw_object(category: str, paint: Paint, rng: np.random.Generator) -> Image.Image:
    pen = Pen(paint.ink)
    CATEGORIES[category](pen, paint, rng)
    drawn = pen.image.crop(
        pen.image.getbbox()
    )  # rotation is the most expensive step, so remove empty margins first
    rotated = drawn if rng.random() < 0.5 else ImageOps.mirror(drawn)
    degrees = float(rng.uniform(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES))
    rotated = rotated.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=(255, 255, 255, 0))
    return rotated.crop(rotated.getbbox())


def _place_near_the_center(
    size: tuple[int, int], cutout: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int]:
    """Top left corner of the object, inside the image and near the center."""
    reach = 0.06 * min(size)
    corner = [
        int(np.clip((outer - inner) / 2 + rng.uniform(-reach, reach), 0, outer - inner))
        for outer, inner in zip(size, cutout, strict=True)
    ]
    return corner[0], corner[1]


def _draw_background(size: tuple[int, int], paint: Paint, rng: np.random.Generator) -> Image.Image:
    """Draw a gradient, with stripes, spots or a floor on some images."""
    far = mix(paint.ground, (255, 255, 255) if rng.random() < 0.5 else (30, 30, 40), rng.uniform(0.1, 0.5))
    corners = np.array([[paint.ground, far], [paint.ground, far] if rng.random() < 0.5 else [far, far]])
    image = Image.fromarray(corners.astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    shade = mix(paint.ground, far, 0.5)
    pattern = rng.choice(["plain", "stripes", "spots", "floor"])
    if pattern == "stripes":
        _draw_stripes(draw, size, shade, rng)
    elif pattern == "spots":
        _draw_spots(draw, size, shade, rng)
    elif pattern == "floor":
        draw.rectangle((0, size[1] * rng.uniform(0.6, 0.8), *size), fill=shade)
    return image


def _draw_stripes(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], color: Color, rng: np.random.Generator
) -> None:
    step, lean = int(rng.integers(20, 70)), int(rng.integers(-120, 120))
    for x in range(-120, size[0] + 120, step):
        draw.line((x, 0, x + lean, size[1]), fill=color, width=step // 3)


def _draw_spots(
    draw: ImageDraw.ImageDraw, size: tuple[int, int], color: Color, rng: np.random.Generator
) -> None:
    for _ in range(int(rng.integers(4, 12))):
        x, y, radius = rng.uniform(0, size[0]), rng.uniform(0, size[1]), rng.uniform(6, 40)
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add noise from one repeated random tile, because random numbers for every pixel would be expensive."""
    strength = rng.uniform(0, 14)
    noise = rng.standard_normal((NOISE_TILE_PIXELS, NOISE_TILE_PIXELS), dtype=np.float32) * strength
    tile = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8)).convert("RGB")
    grain = Image.new("RGB", image.size)
    for left in range(0, image.width, NOISE_TILE_PIXELS):
        for top in range(0, image.height, NOISE_TILE_PIXELS):
            grain.paste(tile, (left, top))
    return ImageChops.add(image, grain, offset=-128)
