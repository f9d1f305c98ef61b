"""Pictures inside the page: images as they are, maps of classes in colours, and where a map is wrong."""

import base64
import colorsys
import io
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# Apart for most eyes, on a light page and on a dark one; the first, often a background, is the quietest.
COLOURS = (
    *("#39424e", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ff8833", "#9966cc", "#88cc66"),
    *("#e5c7a0", "#008080"),
)
WRONG = (224, 49, 49)
# Of an image under an error map, that its marks stand out: grey, from black to this share of white, plus that share.
DIM, LIFT = 0.6, 0.25


def source(picture: "Image") -> str:
    """A picture as the source of an `img`."""
    file = io.BytesIO()
    picture.save(file, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def photograph(pixels: np.ndarray) -> "Image":
    """Of (C, H, W) uint8 with 1 or 3 channels."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, 2))


def class_map(labels: np.ndarray, classes: int) -> "Image":
    """Of (H, W) integers; what is no class is transparent."""
    from PIL import Image

    picture = Image.fromarray(np.where(labels < classes, labels, classes).astype(np.uint8))
    colours = [bytes.fromhex(colour(label)[1:]) for label in range(classes)]
    picture.putpalette(b"".join([*colours, b"\0\0\0"]))
    picture.info["transparency"] = classes
    return picture


def error_map(pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray, classes: int) -> "Image":
    """The image in dim grey, wrong pixels marked, pixels without a label transparent.

    Args:
        pixels: (C, H, W) uint8. truth, prediction: (H, W) integers.
    """
    from PIL import Image

    grey = (DIM * pixels.mean(axis=0) + LIFT * 255).astype(np.uint8)
    shown = np.stack([grey, grey, grey, np.full_like(grey, 255)], axis=2)
    shown[truth != prediction, :3] = WRONG
    shown[truth >= classes] = 0
    return Image.fromarray(shown)


def colour(label: int) -> str:
    """The colour of a class, as #rrggbb; beyond the table, hues by the golden angle."""
    if label < len(COLOURS):
        return COLOURS[label]
    hue, turn = label * 0.381966 % 1, label % 3
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 - 0.2 * turn, 0.95 - 0.2 * turn)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
