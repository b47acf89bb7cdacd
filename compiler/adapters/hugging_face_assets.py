"""What stands beside the weights of a Hugging Face checkpoint: tokenizer, chat template, image settings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import ModelError
from triptych.manifest import ChatSettings, ImageSettings


@dataclass(frozen=True)
class Assets:
    """Files and settings of a checkpoint. `pixel_shape` is (1, 3, H, W), None for a text model.

    `special_ids` are the tokens that were added to the tokenizer's own: those of the chat template among them.
    """

    tokenizer_file: Path | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat: ChatSettings
    processor: Any
    image_token_id: int | None
    pixel_shape: tuple[int, int, int, int] | None
    special_ids: tuple[int, ...] = ()

    def image_settings(self, tokens: int) -> ImageSettings | None:
        """Describe preprocessing and placeholders, `tokens` being the embeddings of one image."""
        if self.pixel_shape is None or self.image_token_id is None:
            return None
        images = self.processor.image_processor
        prefix, suffix = self._around(tokens)
        return ImageSettings(
            token=self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id),
            token_id=self.image_token_id,
            tokens=tokens,
            resize=_resize(images),
            resample=int(images.resample),
            crop=_height_width(images.crop_size) if images.do_center_crop else None,
            rescale=float(images.rescale_factor) if images.do_rescale else None,
            mean=tuple(images.image_mean) if images.do_normalize else None,
            std=tuple(images.image_std) if images.do_normalize else None,
            prefix=prefix,
            suffix=suffix,
        )

    def _around(self, tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ask the processor what it puts around the placeholders of one image."""
        from PIL import Image

        assert self.pixel_shape is not None
        tokenizer = self.processor.tokenizer
        picture = Image.new("RGB", (self.pixel_shape[3], self.pixel_shape[2]))
        token = tokenizer.convert_ids_to_tokens(self.image_token_id)
        ids = self.processor(text=[token], images=[picture], add_special_tokens=False)["input_ids"][0]
        ids = [int(one) for one in ids]
        if ids.count(self.image_token_id) != tokens:
            raise ModelError(
                f"the processor puts {ids.count(self.image_token_id)} placeholders for one image and the encoder gives "
                f"{tokens} embeddings; the checkpoint's processor does not belong to its weights"
            )
        first = ids.index(self.image_token_id)
        if ids[first : first + tokens] != [self.image_token_id] * tokens:
            raise ModelError("the processor puts other tokens between an image's placeholders, which is not supported")
        return tuple(ids[:first]), tuple(ids[first + tokens :])


def read_assets(folder: Path, config: Any) -> Assets:
    """Read what `folder` holds beside the weights; raises `ModelError` for an image processor without a fixed size."""
    tokenizer_file = folder / "tokenizer.json"
    image_token_id = getattr(config, "image_token_id", None)
    processor, pixel_shape = None, None
    if image_token_id is not None:
        from transformers import AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        except (ValueError, OSError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"the processor in {folder} does not load: {reason}") from error
        pixel_shape = _pixel_shape(processor.image_processor)
    settings = _json(folder / "tokenizer_config.json")
    vocabulary = _special_ids(tokenizer_file)
    bos, eos = _token(settings.get("bos_token")), _token(settings.get("eos_token"))
    generation = _json(folder / "generation_config.json").get("eos_token_id")
    eos_ids = [generation] if isinstance(generation, int) else list(generation or ())
    if eos is not None and eos in vocabulary:
        eos_ids.append(vocabulary[eos])
    return Assets(
        tokenizer_file=tokenizer_file if tokenizer_file.is_file() else None,
        bos_id=vocabulary.get(bos) if bos is not None else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        chat=ChatSettings(_chat_template(folder, settings), bos, eos),
        processor=processor,
        image_token_id=image_token_id,
        pixel_shape=pixel_shape,
        special_ids=tuple(sorted(vocabulary.values())),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(f"{path} is no JSON: {error}") from error
    return data if isinstance(data, dict) else {}


def _token(value: Any) -> str | None:
    return value.get("content") if isinstance(value, dict) else value


def _special_ids(tokenizer_file: Path) -> dict[str, int]:
    added = _json(tokenizer_file).get("added_tokens", [])
    return {token["content"]: int(token["id"]) for token in added}


def _chat_template(folder: Path, settings: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = _json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    return template if isinstance(template, str) else None


def _height_width(size: Any) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def _resize(images: Any) -> tuple[int, ...] | None:
    if not images.do_resize:
        return None
    size = dict(images.size)
    if "shortest_edge" in size and size["shortest_edge"] is not None:
        return (int(size["shortest_edge"]),)
    return _height_width(size)


def _pixel_shape(images: Any) -> tuple[int, int, int, int]:
    resize = _resize(images)
    fixed = _height_width(images.crop_size) if images.do_center_crop else resize
    if fixed is None or len(fixed) != 2:
        raise ModelError(
            f"the image processor gives pictures of no fixed size (size {images.size}), which is not supported"
        )
    return 1, 3, fixed[0], fixed[1]
