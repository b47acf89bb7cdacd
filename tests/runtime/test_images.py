import io
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from triptych.errors import ArtifactError, RunError
from triptych.manifest import ImageSettings, TensorSignature
from triptych.runtime.images import load_image, preprocess

SIGLIP = ImageSettings("<image>", 3, 1, (32, 32), 3, None, 1 / 255, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
CLIP = ImageSettings("<image>", 3, 1, (24,), 3, (24, 24), 1 / 255, (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))
SIZES = [(32, 32), (7, 5), (101, 33), (33, 101), (1, 40), (333, 250), (31, 49), (49, 31)]


def port(height: int, width: int) -> TensorSignature:
    return TensorSignature("pixel_values", "float32", (1, 3, height, width))


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    """A random picture; the palette one has a transparent colour."""
    bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "P": 3, "1": 1}[mode]
    pixels = torch.randint(0, 256, (size[1], size[0], bands), dtype=torch.uint8).numpy()
    if mode == "1":
        return Image.fromarray(pixels[..., 0], "L").convert("1")
    if mode == "P":
        image = Image.fromarray(pixels).convert("P")
        image.info["transparency"] = 0
        return image
    return Image.fromarray(pixels[..., 0] if bands == 1 else pixels)


def assert_equal_to(processor: Any, settings: ImageSettings, image: Image.Image, side: int) -> None:
    reference = torch.as_tensor(processor(image, return_tensors="pt")["pixel_values"])
    ours = preprocess(image, settings, port(side, side))
    assert ours.dtype == torch.float32
    assert ours.is_contiguous()
    assert settings.std is not None
    scale = torch.tensor(settings.std).view(1, 3, 1, 1)
    assert ((ours - reference) * scale).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_equals_the_siglip_processor(mode: str) -> None:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    processor = SiglipImageProcessorPil(
        size={"height": 32, "width": 32}, image_mean=list(SIGLIP.mean or ()), image_std=list(SIGLIP.std or ())
    )
    for size in SIZES:
        assert_equal_to(processor, SIGLIP, picture(mode, size), 32)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
@pytest.mark.parametrize("crop", [24, 20, 31])
def test_equals_the_clip_processor(mode: str, crop: int) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": crop, "width": crop},
        image_mean=list(CLIP.mean or ()),
        image_std=list(CLIP.std or ()),
    )
    settings = ImageSettings(**{**vars(CLIP), "crop": (crop, crop)})
    for size in SIZES:
        assert_equal_to(processor, settings, picture(mode, size), crop)


def test_steps_can_be_left_out() -> None:
    image = picture("RGB", (4, 3))
    bare = ImageSettings("<image>", 3, 1, None, 3, None, None, None, None)
    values = preprocess(image, bare, port(3, 4))
    assert values[0, :, 1, 2].tolist() == list(image.getpixel((2, 1)) or ())  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"give \[1, 3, 3, 4\], the encoder takes \[1, 3, 8, 8\]"):
        preprocess(image, bare, port(8, 8))


def test_orientation_is_applied_as_transformers_does(tmp_path: Path) -> None:
    from transformers.image_utils import load_image as reference

    image, exif = picture("RGB", (6, 4)), Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    turned = load_image(path)
    assert turned.size == (4, 6)
    assert turned.tobytes() == reference(str(path)).tobytes()
    assert load_image(turned).size == (4, 6)  # turned once only


def test_missing_foreign_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such file"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(RunError, match="cannot be read"):
        load_image(tmp_path)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(RunError, match="no image that Pillow reads"):
        load_image(text)
    picture("RGB", (60, 60)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    for cut in (40, 60, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.png").write_bytes(whole[:cut])
        with pytest.raises(RunError) as caught:
            load_image(tmp_path / "cut.png")
        assert "\n" not in str(caught.value)
    flipped = bytearray(whole)
    flipped[60:90] = bytes(30)
    (tmp_path / "flipped.png").write_bytes(flipped)
    with pytest.raises(RunError, match="is damaged"):
        load_image(str(tmp_path / "flipped.png"))


@pytest.mark.parametrize("size", [(10_000, 10_000), (20_000, 20_000)])
def test_over_large_pictures_are_refused_undecoded(tmp_path: Path, size: tuple[int, int]) -> None:
    """A PNG header alone says 100 megapixels; the data behind it is absent, so decoding would fail otherwise."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path = tmp_path / "large.png"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RunError, match="scale it down to 50,000,000"):
            load_image(path)


def test_limit_applies_to_pictures_in_memory() -> None:
    with pytest.raises(RunError, match="image has 10x10 = 100 pixels; scale it down to 99"):
        load_image(Image.new("RGB", (10, 10)), max_pixels=99)
