"""Hugging Face models as entry points, through the surface that all of them share.

No model class is named: the parts come from ``get_encoder``, ``get_decoder``, ``get_input_embeddings`` and
``get_output_embeddings``, the image features from ``get_image_features``, and the logits from the model's own
forward, so scaled or capped logits stay what they are. The description is stateless; passes add the cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from triptych.compiler.adapters.hugging_face_assets import Assets, read_assets
from triptych.compiler.model import CONTEXT, EagerOutputs, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.roles import DECODE, PREFILL, TOKEN_EMBEDDING, encoder
from triptych.errors import ModelError
from triptych.manifest import DynamicDim, TensorSignature

DEFAULT_CONTEXT: Final = 2048
ATTENTION_NAME: Final = "triptych_plain"
IMAGE_POSITIONS: Final = frozenset({"token_type_ids", "mm_token_type_ids"})
"""The arguments by which a decoder hears which positions are an image's."""
SEQUENCE: Final = DynamicDim("S", 1, CONTEXT)
START_POS: Final = TensorSignature("start_pos", "int64", (1,), ("position",))


def load(folder: Path, *, max_context: int | None = None) -> Model:
    """Load a local checkpoint in float32 and describe it; raises `ModelError` for anything else in `folder`."""
    if not folder.is_dir():
        raise ModelError(f"no model at {folder}: the folder does not exist; give the path of a local checkpoint")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is no model: it has no config.json; give a Hugging Face checkpoint folder")
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        context_of(config, max_context)
        auto_class = (
            transformers.AutoModelForImageTextToText
            if type(config) in transformers.AutoModelForImageTextToText._model_mapping
            else transformers.AutoModelForCausalLM
        )
        with _no_progress_bar():
            module = auto_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the checkpoint in {folder} does not load: {reason}") from error
    return describe(module.eval(), read_assets(folder, config), max_context=max_context, name=folder.name)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading is one stage of ours; the library's own bar would break into it."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def describe(module: Any, assets: Assets, *, max_context: int | None = None, name: str = "") -> Model:
    """Describe a loaded ``PreTrainedModel``: entry points by the ABI, metadata, and its eager reference.

    `max_context` defaults to what the model allows, at most 2,048. Raises `ModelError` for an encoder-decoder, for a
    context the model does not allow, and for a model that treats the positions of an image in a way of their own.
    """
    config = module.config
    context, limit = context_of(config, max_context)
    telling = IMAGE_POSITIONS & inspect.signature(module.forward).parameters.keys()
    if assets.pixel_shape is not None and telling:
        raise ModelError(
            f"{config.model_type} takes {min(telling)}: it masks or counts the positions of an image in another way "
            "than those of text, which is not supported"
        )
    width = int(module.get_input_embeddings().weight.shape[1])
    image = assets.image_settings(_image_tokens(module, assets))
    if image is not None and image.tokens >= context:
        raise ModelError(f"max context is {context}; one image alone takes {image.tokens} positions, so give more")
    entry_points = (*_encoders(assets), *_text_entry_points(width, has_image=assets.pixel_shape is not None))
    return Model(
        module=module,
        entry_points=entry_points,
        metadata=Metadata(
            max_context=context,
            model_max_context=limit,
            vocab_size=int(module.get_output_embeddings().weight.shape[0]),
            bos_id=assets.bos_id,
            eos_ids=assets.eos_ids or _ids(module.generation_config.eos_token_id),
            image=image,
            chat=assets.chat,
            components=_components(module, has_image=assets.pixel_shape is not None),
            provenance={"model": name, "model_type": str(config.model_type)},
            special_ids=assets.special_ids,
        ),
        eager=_eager,
        tokenizer_file=assets.tokenizer_file,
    )


def context_of(config: Any, max_context: int | None) -> tuple[int, int]:
    """Return the context to build for and the most the model allows; raises `ModelError` where that cannot be."""
    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder; describe it with hand-written entry points")
    limit = int(config.get_text_config(decoder=True).max_position_embeddings)
    context = min(limit, DEFAULT_CONTEXT) if max_context is None else max_context
    if not 1 <= context <= limit:
        raise ModelError(f"max context is {context}; {config.model_type} allows 1 to {limit} positions")
    return context, limit


def _text_entry_points(width: int, *, has_image: bool) -> tuple[EntryPoint, ...]:
    embed_sources = ("token_embedding.embeds", *(("vision_encoder.embeds",) if has_image else ()))
    tokens = TensorSignature("tokens", "int64", (1, SEQUENCE), ("tokens",))
    return (
        EntryPoint(
            "token_embedding",
            frozenset({TOKEN_EMBEDDING}),
            _embed,
            (tokens,),
            (OutputPort("embeds", ("prefill.embeds",)),),
        ),
        EntryPoint(
            "prefill",
            frozenset({PREFILL}),
            _logits,
            (TensorSignature("embeds", "float32", (1, SEQUENCE, width), embed_sources), START_POS),
            (OutputPort("logits", ("sampler",)),),
        ),
        EntryPoint(
            "decode",
            frozenset({DECODE}),
            lambda module, tokens, start_pos: _logits(module, _embed(module, tokens), start_pos),
            (TensorSignature("tokens", "int64", (1, 1), ("tokens",)), START_POS),
            (OutputPort("logits", ("sampler",)),),
        ),
    )


def _encoders(assets: Assets) -> tuple[EntryPoint, ...]:
    if assets.pixel_shape is None:
        return ()
    pixels = TensorSignature("pixel_values", "float32", assets.pixel_shape, ("image",))
    output = OutputPort("embeds", ("prefill.embeds",))
    return (EntryPoint("vision_encoder", frozenset({encoder("image")}), _image_features, (pixels,), (output,)),)


def _embed(module: Any, tokens: Tensor) -> Tensor:
    embeds: Tensor = module.get_input_embeddings()(tokens)
    return embeds


def _logits(module: Any, embeds: Tensor, start_pos: Tensor) -> Tensor:
    positions = torch.arange(embeds.shape[1], device=embeds.device) + start_pos
    with plain_attention(module):
        outputs = module(
            inputs_embeds=embeds,
            position_ids=positions.unsqueeze(0),
            # Nothing is padded; saying so keeps the model from looking for packed sequences.
            attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64, device=embeds.device),
            use_cache=False,
        )
    logits: Tensor = outputs.logits
    return logits


def _image_features(module: Any, pixel_values: Tensor) -> Tensor:
    with plain_attention(module):
        return _own_image_features(module, pixel_values)


def _own_image_features(module: Any, pixel_values: Tensor) -> Tensor:
    features = module.base_model.get_image_features(pixel_values).pooler_output
    rows = features if isinstance(features, (list, tuple)) else [features]
    return torch.cat([row.reshape(-1, row.shape[-1]) for row in rows], dim=0)


def _image_tokens(module: Any, assets: Assets) -> int:
    if assets.pixel_shape is None:
        return 0
    with torch.no_grad():
        return int(_own_image_features(module, torch.zeros(assets.pixel_shape)).shape[0])


def _eager(module: nn.Module, tokens: Tensor, pixel_values: tuple[Tensor, ...]) -> EagerOutputs:
    model: Any = module
    inputs: dict[str, Any] = {"input_ids": tokens.unsqueeze(0), "use_cache": False}
    if pixel_values:
        inputs["pixel_values"] = torch.cat(pixel_values, dim=0)
    with torch.no_grad():
        return EagerOutputs(
            logits=model(**inputs).logits[0],
            image_embeds=tuple(_own_image_features(model, pixels) for pixels in pixel_values),
            token_embeds=_embed(model, tokens),
        )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _components(module: Any, *, has_image: bool) -> dict[str, tuple[str, ...]]:
    """Name the parts by the modules they are; what belongs to no part and has weights is the projector."""
    names = {id(child): name for name, child in module.named_modules()}
    parts: dict[str, Any] = {
        "embedding": module.get_input_embeddings(),
        "decoder": module.get_decoder(),
        "lm_head": module.get_output_embeddings(),
    }
    if has_image:
        parts["vision"] = module.get_encoder(modality="image")
    components: dict[str, tuple[str, ...]] = {part: (names[id(child)],) for part, child in parts.items()}
    if has_image:
        known = tuple(prefix for prefixes in components.values() for prefix in prefixes)
        components["projector"] = tuple(
            name
            for name, child in module.named_modules()
            if any(True for _ in child.parameters(recurse=False))
            and not any(name == prefix or name.startswith(f"{prefix}.") for prefix in known)
        )
    return components


@contextmanager
def plain_attention(module: Any) -> Iterator[None]:
    """Let every attention of `module` be one ``scaled_dot_product_attention`` call, for the time of a call.

    Uses the library's own attention and mask interfaces; both are global, so the registration and the
    configurations are restored. A mask that is neither causal nor absent, such as a sliding window, is an explicit
    boolean one. Options that such a call cannot express raise `ModelError`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    configs = {id(child.config): child.config for child in module.modules() if _has_config(child)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    AttentionInterface.register(ATTENTION_NAME, _plain_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _plain_mask)
    try:
        for config in configs.values():
            config._attn_implementation_internal = ATTENTION_NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        AttentionInterface._global_mapping.pop(ATTENTION_NAME, None)
        AttentionMaskInterface._global_mapping.pop(ATTENTION_NAME, None)


def _has_config(child: nn.Module) -> bool:
    from transformers import PreTrainedConfig

    return isinstance(getattr(child, "config", None), PreTrainedConfig)


def _plain_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ModelError(f"{type(module).__name__} uses {name} in its attention, which is not supported")
    causal = bool(module.is_causal if is_causal is None else is_causal) and attention_mask is None
    attended = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2), None


def _plain_mask(*, mask_function: Callable[..., Any], **options: Any) -> Tensor | None:
    """Return None for a mask that the attention's `is_causal` says already, else the mask itself, boolean."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    if mask_function in (causal_mask_function, bidirectional_mask_function):
        return None
    # Nothing is padded, and under export a mask must not be there or not for the length of the example.
    options |= {"attention_mask": None, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor = sdpa_mask(mask_function=mask_function, **options)
    return mask
