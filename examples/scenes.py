"""One image: an object of `drawings` turned, scaled and placed in front of a background."""

from dataclasses import dataclass

import numpy as np
from drawings import CATEGORIES, Color, Paint, Pen, choose_paint, mix
from PIL import Image, ImageChops, ImageDraw, ImageOps

SHORTEST_PIXELS, LONGEST_PIXELS = 160, 640
TURN_DEGREES = 20.0
NOISE_TILE_PIXELS = 160


@dataclass(frozen=True, slots=True)
class Scene:
    """A drawn image and the name of its object's color."""

    image: Image.Image
    color_name: str


def draw_scene(category: str, rng: np.random.Generator, transparent: bool) -> Scene:
    """An RGB image of `category`, or an RGBA one without a background where `transparent`."""
    paint = choose_paint(rng)
    size = _choose_size(rng)
    thing = _draw_object(category, paint, rng)
    scale = rng.uniform(0.6, 0.92) * min(size) / max(thing.size)
    thing = thing.resize((round(thing.width * scale), round(thing.height * scale)), Image.Resampling.BILINEAR)
    corner = _place_near_the_center(size, thing.size, rng)
    if transparent:
        image = Image.new("RGBA", size, (255, 255, 255, 0))
        image.alpha_composite(thing, corner)
        return Scene(image, paint.name)
    image = _draw_background(size, paint, rng)
    image.paste(thing, corner, thing)
    return Scene(_add_noise(image, rng), paint.name)


def _choose_size(rng: np.random.Generator) -> tuple[int, int]:
    """Width and height, as many small images as large ones by ratio.

    At most 4:3, or the center crop of any network would miss the object.
    """
    width, height = (
        np.exp(rng.uniform(np.log(SHORTEST_PIXELS), np.log(LONGEST_PIXELS), 2)).astype(int).tolist()
    )
    return min(width, height * 4 // 3), min(height, width * 4 // 3)


def _draw_object(category: str, paint: Paint, rng: np.random.Generator) -> Image.Image:
    pen = Pen(paint.ink)
    CATEGORIES[category](pen, paint, rng)
    drawn = pen.image.crop(pen.image.getbbox())  # turning is the dearest step, so turn no empty margin
    turned = drawn if rng.random() < 0.5 else ImageOps.mirror(drawn)
    degrees = float(rng.uniform(-TURN_DEGREES, TURN_DEGREES))
    turned = turned.rotate(degrees, Image.Resampling.BILINEAR, expand=True, fillcolor=(255, 255, 255, 0))
    return turned.crop(turned.getbbox())


def _place_near_the_center(
    size: tuple[int, int], thing: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int]:
    """Top left corner of the object: inside the image, and mostly inside its central square."""
    reach = 0.06 * min(size)
    corner = [
        int(np.clip((outer - inner) / 2 + rng.uniform(-reach, reach), 0, outer - inner))
        for outer, inner in zip(size, thing, strict=True)
    ]
    return corner[0], corner[1]


def _draw_background(size: tuple[int, int], paint: Paint, rng: np.random.Generator) -> Image.Image:
    """A gradient between two shades, and on some images stripes, spots or a floor."""
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
    """Grain of one random tile, repeated: drawing a normal number for every pixel would cost the most."""
    strength = rng.uniform(0, 14)
    noise = rng.standard_normal((NOISE_TILE_PIXELS, NOISE_TILE_PIXELS), dtype=np.float32) * strength
    tile = Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8)).convert("RGB")
    grain = Image.new("RGB", image.size)
    for left in range(0, image.width, NOISE_TILE_PIXELS):
        for top in range(0, image.height, NOISE_TILE_PIXELS):
            grain.paste(tile, (left, top))
    return ImageChops.add(image, grain, offset=-128)
