"""``adopt-abi``: the methods become the ones that another runtime calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import torch

from triptych.compiler.abi import FORWARD, TEXT_DECODER, TOKEN_EMBEDDING_METHOD, VISION_ENCODER
from triptych.compiler.capture import output_signatures
from triptych.compiler.compose import compose
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import MatchLog, ProgramPass
from triptych.compiler.program import Method, Program
from triptych.compiler.properties import KV_CACHE, Property
from triptych.compiler.roles import DECODE, PREFILL
from triptych.manifest import EXECUTORCH_LLM_ABI, TensorSignature

IMAGE_DTYPES: Final = ("float32", "uint8", "bfloat16")
DECODER_KINDS: Final = ("prefill", "prefill_first", "decode", "score")
PREFILL_AND_DECODE: Final = frozenset({PREFILL, DECODE})

Refuse = Callable[[str], None]


@dataclass(frozen=True)
class AdoptABI(ProgramPass):
    """Give the program the entry points that another runtime's contract asks for.

    `abi` names the contract. ``executorch-llm`` is that of ExecuTorch's own runners, ``TextLLMRunner`` and
    ``MultimodalRunner``:

    1. Of a program without encoders one method is left: ``forward(tokens [1, S], start_pos [1]) -> logits``, the token
       embedding and the prefill in one. It takes prompts at once and generated tokens one by one.
    2. A program with an image encoder keeps ``token_embedding(tokens [1, S]) -> [1, S, D]``, and its prefill becomes
       ``text_decoder(embeds [1, S, D], start_pos [1]) -> logits``, which takes generated tokens too. The encoder
       becomes ``vision_encoder(pixel_values) -> [1, T, D]``.
    3. Methods that the runners do not call go away.

    The runners give each method memory of its own, so a program in which decoding shares state with an encoder is
    refused, and so is one whose methods take or give other things than the contract says.
    """

    name: ClassVar[str] = "adopt-abi"
    requires: ClassVar[frozenset[Property]] = frozenset({KV_CACHE})
    indivisible: ClassVar[bool] = True

    abi: Literal["executorch-llm"]

    def rewrite(self, program: Program, log: MatchLog) -> Program:
        """Return the program with the contract's methods; the reason for leaving it alone goes to `log`."""
        reason = _refusal(program)
        if reason is not None:
            log.refused("the program", reason)
            return program
        if not log.match("the program"):
            return program
        encoder, embedding, prefill = (_only(program, kind) for kind in ("encoder", "token_embedding", "prefill"))
        assert prefill is not None
        decoder = dataclasses.replace(program.methods[prefill], roles=PREFILL_AND_DECODE)
        if encoder is None:
            if embedding is not None and decoder.inputs[0].name == "embeds":
                decoder = compose(program.methods[embedding], decoder, {"embeds": "embeds"})
            methods = {FORWARD: decoder}
            renamed = {prefill: FORWARD}
        else:
            assert embedding is not None
            methods = {
                VISION_ENCODER: _with_batch(program.methods[encoder], self.name),
                TOKEN_EMBEDDING_METHOD: program.methods[embedding],
                TEXT_DECODER: decoder,
            }
            renamed = {encoder: VISION_ENCODER, embedding: TOKEN_EMBEDDING_METHOD, prefill: TEXT_DECODER}
        metadata = dataclasses.replace(program.metadata, abi=EXECUTORCH_LLM_ABI)
        return Program.build({name: _relinked(method, renamed) for name, method in methods.items()}, metadata)


def _refusal(program: Program) -> str | None:
    """Say why the program cannot keep the contract, or None."""
    if program.metadata.abi == EXECUTORCH_LLM_ABI:
        return f"it keeps the ABI {EXECUTORCH_LLM_ABI} already"
    if program.metadata.kept_tokens is not None:
        return "it takes some tokens of the vocabulary only, and the runners hand over any"
    for kind, least in (("encoder", 0), ("token_embedding", 0), ("prefill", 1)):
        names = [name for name, _ in program.methods_with(kind)]
        if not least <= len(names) <= 1:
            expected = "exactly one" if least else "at most one"
            return f"{len(names)} methods have the role {kind} ({', '.join(names) or 'none'}); expected {expected}"
    return _port_refusal(program) or _state_refusal(program)


def _port_refusal(program: Program) -> str | None:
    """The runners hand over tensors by position: content, then position; one tensor comes back."""
    encoder, embedding, prefill = (_only(program, kind) for kind in ("encoder", "token_embedding", "prefill"))
    assert prefill is not None
    content = "tokens" if embedding is None else "embeds"
    wanted = {prefill: ([content, "start_pos"], ["logits"])}
    if encoder is None and [port.name for port in program.methods[prefill].inputs][:1] == ["tokens"]:
        wanted[prefill] = (["tokens", "start_pos"], ["logits"])
    elif encoder is not None and embedding is None:
        return f"{encoder} gives embeddings and no method has the role token_embedding, which would give those of text"
    if embedding is not None:
        wanted[embedding] = (["tokens"], ["embeds"])
    if encoder is not None:
        wanted[encoder] = (["pixel_values"], ["embeds"])
    for name, (inputs, outputs) in wanted.items():
        method = program.methods[name]
        for word, ports, names in (("takes", method.inputs, inputs), ("gives", method.outputs, outputs)):
            found = [port.name for port in ports]
            if found != names:
                return f"{name} {word} {', '.join(found)}; the runners expect {', '.join(names)}"
    return None if encoder is None else _image_refusal(encoder, program.methods[encoder])


def _image_refusal(name: str, method: Method) -> str | None:
    pixels, embeds = method.inputs[0], method.outputs[0]
    fixed = [size for size in pixels.shape if isinstance(size, int)]
    if len(fixed) < len(pixels.shape) or len(fixed) not in (3, 4) or fixed[:-3] not in ([], [1]):
        return f"{name} takes pixel_values {list(pixels.shape)}; the runners give one image [C, H, W] or [1, C, H, W]"
    if pixels.dtype not in IMAGE_DTYPES:
        return f"{name} takes pixel_values of {pixels.dtype}; the runners give {', '.join(IMAGE_DTYPES)}"
    if len(embeds.shape) == 2 or (len(embeds.shape) == 3 and embeds.shape[0] == 1):
        return None
    return f"{name} gives embeds {list(embeds.shape)}; expected [T, D] or [1, T, D]"


def _state_refusal(program: Program) -> str | None:
    decoding = {name for kind in DECODER_KINDS for name, _ in program.methods_with(kind)}
    for row in program.state.values():
        users = sorted({*row.readers, *row.writers})
        others = [name for name in users if name not in decoding]
        if others and len(users) > 1:
            return (
                f"{', '.join(users)} share the state {row.name}, and the runners give each method memory of its own; "
                "hand the values over as embeddings, or keep the ABI triptych"
            )
    return None


def _only(program: Program, kind: str) -> str | None:
    return next((name for name, _ in program.methods_with(kind)), None)


def _with_batch(encoder: Method, made_by: str) -> Method:
    """Return an encoder whose embeddings have a batch axis: [1, T, D]."""
    if len(encoder.outputs[0].shape) == 3:
        return encoder
    editor = GraphEditor(encoder.exported, made_by)
    (embeds,) = editor.user_outputs
    with editor.graph.inserting_before(editor.graph.output_node()):
        batched = editor.call(torch.ops.aten.unsqueeze.default, embeds, 0, like=embeds)
    editor.replace_user_output(0, batched)
    exported = editor.finish()
    outputs = output_signatures(exported, encoder.outputs, encoder.inputs)
    return dataclasses.replace(encoder, exported=exported, outputs=outputs)


def _relinked(method: Method, renamed: Mapping[str, str]) -> Method:
    """Return the method with links that speak of the methods' new names; those to methods that are gone go too."""

    def relinked(port: TensorSignature) -> TensorSignature:
        links = []
        for link in port.links:
            name, dot, rest = link.partition(".")
            if not dot or name in renamed:
                links.append(f"{renamed.get(name, name) if dot else name}{dot}{rest}")
        return dataclasses.replace(port, links=tuple(links))

    return dataclasses.replace(
        method, inputs=tuple(map(relinked, method.inputs)), outputs=tuple(map(relinked, method.outputs))
    )
