"""Photographs: those bundled with scikit-image and scikit-learn, or a folder of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from foveate.core.errors import bad, need_extra

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp")
# Held-out pictures show other subjects than the trained ones: a cat, a temple, a man with a camera.
TRAIN = ("astronaut", "coffee", "rocket", "motorcycle", "flower", "grass", "gravel", "brick")
TEST = ("chelsea", "china", "camera")


def _bundled(name: str) -> object:
    """One picture from the files that the packages install; nothing is downloaded."""
    if name in ("china", "flower"):
        try:
            from sklearn.datasets import load_sample_image
        except ImportError as error:
            raise need_extra("sklearn", "compare") from error
        return load_sample_image(f"{name}.jpg")
    try:
        from skimage import data
    except ImportError as error:
        raise need_extra("skimage", "compare") from error
    if name == "motorcycle":
        return data.stereo_motorcycle()[0]
    load: Callable[[], object] = getattr(data, name)
    return load()


def to_rgb(array: object) -> Float[Tensor, "3 h w"]:
    """Turn an array of 8- or 16-bit, grey or coloured pixels into RGB in [0, 1]; alpha is dropped."""
    import numpy

    pixels = numpy.asarray(array)
    top = numpy.iinfo(pixels.dtype).max if numpy.issubdtype(pixels.dtype, numpy.integer) else 1.0
    image = torch.from_numpy(pixels.astype("float32") / top)
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] == 2:
        image = image[..., :1]
    return image[..., :3].permute(2, 0, 1).expand(3, -1, -1).contiguous()


@cache
def bundled(part: str) -> tuple[Float[Tensor, "3 h w"], ...]:
    """Return the bundled photographs of `part`, "train" or "test".

    Raises:
        MissingExtraError: scikit-image or scikit-learn is not installed.
    """
    return tuple(to_rgb(_bundled(name)) for name in (TRAIN if part == "train" else TEST))


def files_in(folder: str | Path) -> list[Path]:
    """Return the image files under `folder`, sorted.

    Raises:
        ArgumentError: naming `folder`, when it is no folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise bad("folder", str(folder), "an existing folder of images")
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)


def read(path: Path) -> Float[Tensor, "3 h w"]:
    """Read one image file.

    Raises:
        ArgumentError: naming `folder` and the file, when it can't be read.
        MissingExtraError: scikit-image is not installed.
    """
    try:
        from skimage import io
    except ImportError as error:
        raise need_extra("skimage", "compare") from error
    try:
        pixels = io.imread(path)
    except Exception as error:
        raise bad("folder", str(path), "a readable image file", f"Reading it says: {error}") from error
    if pixels.ndim == 4:  # an animation: its first picture
        pixels = pixels[0]
    return to_rgb(pixels)
