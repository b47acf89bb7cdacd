"""Pictures to `pixel_values`, with Pillow and torch alone.

The steps and their order are those of transformers' Pillow image processors (`PilBackend` in
``transformers/image_processing_backends.py``), so the values equal theirs to 1/255 before normalization.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from triptych.errors import ArtifactError, RunError
from triptych.manifest import ImageSettings, TensorSignature
from triptych.runtime.signatures import shape_text

ImageSource = Path | str | Image.Image

MAX_PIXELS: Final = 50_000_000

# What Pillow's decoders raise on damaged data, beside its own errors.
_DECODE_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error)


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Return the decoded picture, turned upright as its EXIF orientation says (so does transformers' `load_image`).

    Raises `RunError` where the file is missing, no picture or damaged, and, before anything is decoded, where
    it has more than `max_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        return _upright(source, "image", max_pixels)
    path = Path(source)
    with _open(path, max_pixels) as image:
        return _upright(image, f"image {path}", max_pixels)


def _upright(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Return a decoded, upright copy."""
    width, height = image.size
    if width * height > max_pixels:
        raise RunError(f"{name} has {width}x{height} = {width * height:,} pixels; scale it down to {max_pixels:,}")
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS as error:
        raise RunError(f"{name} is damaged: {error}; save it again") from error


def _open(path: Path, max_pixels: int) -> Image.Image:
    """Read the header only. Pillow's size warning is off here, for the caller checks the size itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except Image.DecompressionBombError as error:
        raise RunError(f"image {path} is too large: {error}; scale it down to {max_pixels:,} pixels") from error
    except FileNotFoundError as error:
        raise RunError(f"no image at {path}: there is no such file; check the path") from error
    except UnidentifiedImageError as error:
        raise RunError(f"{path} is no image that Pillow reads; save it as PNG or JPEG") from error
    except _DECODE_ERRORS as error:
        raise RunError(f"image {path} cannot be read: {error}; check the file") from error


def preprocess(image: Image.Image, settings: ImageSettings, port: TensorSignature) -> Tensor:
    """Return `pixel_values`, float32 [1, 3, H, W], for the encoder's input `port`.

    Steps, each left out where the settings say so: RGB on white, resize, centre crop, rescale, normalize.
    Raises `ArtifactError` where the result has another shape than `port`, which is a fault of the export.
    """
    image = to_rgb(image)
    if settings.resize is not None:
        height, width = _resized(settings.resize, image)
        image = image.resize((width, height), resample=Image.Resampling(settings.resample))
    if settings.crop is not None:
        image = _center_crop(image, *settings.crop)
    width, height = image.size
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    values = pixels.view(height, width, 3).permute(2, 0, 1).to(torch.float32)
    if settings.rescale is not None:
        values = values * settings.rescale
    if settings.mean is not None and settings.std is not None:
        values = (values - _channels(settings.mean)) / _channels(settings.std)
    values = values.unsqueeze(0).contiguous()
    if tuple(values.shape) != port.shape:
        raise ArtifactError(
            f"the image settings give {list(values.shape)}, the encoder takes {shape_text(port.shape)}; "
            "export the model again"
        )
    return values


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the picture as RGB, transparency laid on white (transformers' `convert_to_rgb`)."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _resized(resize: tuple[int, ...], image: Image.Image) -> tuple[int, int]:
    """Return (height, width) after the resize; (edge,) scales the shorter side to `edge`, rounding down the longer."""
    if len(resize) == 2:
        return resize[0], resize[1]
    (edge,) = resize
    width, height = image.size
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def _center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut (height, width) from the centre; a smaller picture gets black borders, the odd pixel above and left."""
    top = (image.height - height) // 2
    left = (image.width - width) // 2
    return image.crop((left, top, left + width, top + height))


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
