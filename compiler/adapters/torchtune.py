"""torchtune models as entry points, through the surface that all of them share.

A decoder is called with tokens and ``input_pos``; a fusion model adds ``encoder_input``, what its encoder is called
with, and ``encoder_mask``, which token attends to which position of the encoder. torchtune itself is not imported.
Its own key-value caches must not be set up: the description is stateless, and passes add the caches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from triptych.compiler.cross_attention import ENCODER_PRESENT, ENCODER_STATES
from triptych.compiler.model import CONTEXT, EagerForward, EagerOutputs, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.roles import DECODE, PREFILL, encoder
from triptych.errors import ModelError
from triptych.manifest import ChatSettings, DynamicDim, ImageSettings, TensorSignature

DEFAULT_CONTEXT: Final = 2048
START_POS: Final = TensorSignature("start_pos", "int64", (1,), ("position",))
SEQUENCE: Final = DynamicDim("S", 1, CONTEXT)

EncoderInput = Callable[[Tensor], Mapping[str, Tensor]]
"""`pixel_values` of one image → what a fusion model's encoder is called with."""


def one_tile(pixel_values: Tensor) -> Mapping[str, Tensor]:
    """Return [1, C, H, W] as one image of one tile, the input of torchtune's own vision encoders."""
    return {"images": pixel_values[:, None, None]}


def describe(
    module: Any,
    *,
    max_context: int | None = None,
    bos_id: int | None = None,
    eos_ids: tuple[int, ...] = (),
    image: ImageSettings | None = None,
    pixel_shape: tuple[int, ...] | None = None,
    encoder_input: EncoderInput = one_tile,
    tokenizer_file: Path | None = None,
    chat: ChatSettings | None = None,
) -> Model:
    """Describe a ``TransformerDecoder``, or a ``DeepFusionModel`` over one.

    A token attends to the last image whose placeholder stands at it or before it, and to none before the first.

    Args:
        module: the model, with weights loaded and without caches.
        max_context: positions to build for; what the model allows where None, at most 2,048.
        bos_id: the id of the token that begins a text, if any.
        eos_ids: the ids of the tokens that end one.
        image: how a picture becomes `pixel_values`, for a fusion model. The picture takes no positions (`tokens` is 0);
            its placeholder is a token like others, the first one to attend to it (`suffix` begins with `token_id`).
        pixel_shape: the shape of the `pixel_values` of one picture, [1, C, H, W].
        encoder_input: what the model's encoder is called with for one picture; every tensor [1, 1, ...], where the
            second dimension counts pictures.
        tokenizer_file: travels into artifacts.
        chat: the chat template.

    Raises:
        ModelError: for a model of another surface, one whose caches are set up, an impossible `max_context`, and image
            settings that do not fit.
    """
    decoder = _decoder(module)
    limit = int(decoder.max_seq_len)
    context = min(limit, DEFAULT_CONTEXT) if max_context is None else max_context
    if not 1 <= context <= limit:
        raise ModelError(f"max context is {context}; this {type(module).__name__} allows 1 to {limit} positions")
    if decoder.caches_are_setup():
        raise ModelError(
            f"the caches of this {type(module).__name__} are set up; describe it before setup_caches, and let "
            "static-kv-cache and cond-attention add the caches"
        )
    _check_image(module, image, pixel_shape)
    with torch.no_grad():
        vocab_size = int(_logits(module, torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
    return Model(
        module=module,
        entry_points=_entry_points(module, pixel_shape, encoder_input),
        metadata=Metadata(
            max_context=context,
            model_max_context=limit,
            vocab_size=vocab_size,
            bos_id=bos_id,
            eos_ids=eos_ids,
            image=image,
            chat=chat or ChatSettings(template=None),
            components=_components(module, decoder),
            provenance={"model_type": type(module).__name__},
        ),
        eager=_eager(encoder_input, image),
        tokenizer_file=tokenizer_file,
    )


def _decoder(module: nn.Module) -> Any:
    """Return the decoder of a fusion model, or `module` itself where it has the surface of one."""
    children = dict(module.named_children())
    decoder = children["decoder"] if {"decoder", "encoder"} <= children.keys() else module
    if not {"tok_embeddings", "layers", "norm"} <= dict(decoder.named_children()).keys():
        raise ModelError(
            f"{type(module).__name__} has the parts {', '.join(children) or 'none'}; expected those of a torchtune "
            "TransformerDecoder (tok_embeddings, layers, norm) or DeepFusionModel (decoder, encoder)"
        )
    return decoder


def _check_image(module: nn.Module, image: ImageSettings | None, pixel_shape: tuple[int, ...] | None) -> None:
    sees = _decoder(module) is not module
    if sees != (image is not None) or sees != (pixel_shape is not None):
        wanted = "needs image and pixel_shape" if sees else "sees no images: leave out image and pixel_shape"
        raise ModelError(f"{type(module).__name__} {wanted}")
    if image is not None and (image.tokens != 0 or image.suffix[:1] != (image.token_id,)):
        raise ModelError(
            f"the image settings have {image.tokens} tokens, suffix {list(image.suffix)}; expected 0 and a suffix "
            f"that begins with the placeholder, {image.token_id}: a picture takes no positions of its own"
        )


def _components(module: nn.Module, decoder: Any) -> dict[str, tuple[str, ...]]:
    """Name the parts; an output that is no module (tied to the embedding) is none."""
    names = {id(child): name for name, child in module.named_modules()}
    parts = {"embedding": [decoder.tok_embeddings], "decoder": [decoder.layers, decoder.norm]}
    if isinstance(decoder.output, nn.Module):
        parts["lm_head"] = [decoder.output]
    if decoder is not module:
        parts["vision"] = [module.get_submodule("encoder")]
    return {part: tuple(names[id(child)] for child in children) for part, children in parts.items()}


# ---------------------------------------------------------------------------------------------------- entry points


def _entry_points(
    module: nn.Module, pixel_shape: tuple[int, ...] | None, encoder_input: EncoderInput
) -> tuple[EntryPoint, ...]:
    tokens = TensorSignature("tokens", "int64", (1, SEQUENCE), ("tokens",))
    token = TensorSignature("tokens", "int64", (1, 1), ("tokens",))
    logits = (OutputPort("logits", ("sampler",)),)
    extras: tuple[TensorSignature, ...] = ()
    encoders: tuple[EntryPoint, ...] = ()
    if pixel_shape is not None:

        def encode(module: Any, pixel_values: Tensor) -> Any:
            return module.encoder(**encoder_input(pixel_values))

        with torch.no_grad():
            shape = tuple(encode(module, torch.zeros(pixel_shape)).shape)
        extras = (
            TensorSignature(ENCODER_STATES, "float32", shape, (f"vision_encoder.{ENCODER_STATES}",)),
            TensorSignature(ENCODER_PRESENT, "bool", (1,), ("image",)),
        )
        pixels = TensorSignature("pixel_values", "float32", pixel_shape, ("image",))
        links = tuple(f"{method}.{ENCODER_STATES}" for method in ("prefill", "decode"))
        output = OutputPort(ENCODER_STATES, links)
        encoders = (EntryPoint("vision_encoder", frozenset({encoder("image")}), encode, (pixels,), (output,)),)
    return (
        *encoders,
        EntryPoint("prefill", frozenset({PREFILL}), _logits, (tokens, START_POS, *extras), logits),
        EntryPoint("decode", frozenset({DECODE}), _logits, (token, START_POS, *extras), logits),
    )


def _logits(
    module: nn.Module,
    tokens: Tensor,
    start_pos: Tensor | None = None,
    encoder_states: Tensor | None = None,
    encoder_present: Tensor | None = None,
) -> Tensor:
    """Return [1, S, V]; a masked token passes the cross-attention layers by, as all do where there is no image."""
    inputs: dict[str, Any] = {}
    if start_pos is not None:
        inputs["input_pos"] = (torch.arange(tokens.shape[1], device=tokens.device) + start_pos).unsqueeze(0)
    if encoder_states is not None and encoder_present is not None:
        inputs["encoder_input"] = encoder_states
        inputs["encoder_mask"] = encoder_present.reshape(1, 1, 1).expand(1, tokens.shape[1], encoder_states.shape[1])
    return _last(_decoder(module)(tokens, **inputs))


def _last(outputs: Any) -> Tensor:
    """Return the logits of a decoder that gives hidden states before them, or nothing else."""
    logits: Tensor = outputs[-1] if isinstance(outputs, list) else outputs
    return logits


def _eager(encoder_input: EncoderInput, image: ImageSettings | None) -> EagerForward:
    """Return the model's own forward over a whole sequence, all pictures in one call."""

    def forward(module: nn.Module, tokens: Tensor, pixel_values: tuple[Tensor, ...]) -> EagerOutputs:
        model: Any = module
        inputs: dict[str, Any] = {}
        with torch.no_grad():
            if pixel_values and image is not None:
                pictures = [encoder_input(pixels) for pixels in pixel_values]
                joined = {name: torch.cat([one[name] for one in pictures], dim=1) for name in pictures[0]}
                length = model.encoder(**joined).shape[1] // len(pictures)
                inputs = {"encoder_input": joined, "encoder_mask": _mask(tokens, image.token_id, len(pictures), length)}
            logits = _last(model(tokens.unsqueeze(0), **inputs))[0]
            return EagerOutputs(logits, (), _decoder(module).tok_embeddings(tokens.unsqueeze(0))[0])

    return forward


def _mask(tokens: Tensor, placeholder: int, pictures: int, length: int) -> Tensor:
    """Return bool [1, S, pictures * length]: each token attends to the last picture at it or before it."""
    last = torch.eq(tokens, placeholder).cumsum(0)
    return (last[:, None] == torch.arange(1, pictures + 1)).repeat_interleave(length, dim=1).unsqueeze(0)
