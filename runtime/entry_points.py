"""Which method plays which part in generation, read from the roles in the manifest and checked at load time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import ArtifactError
from triptych.manifest import Manifest, MethodSignature
from triptych.runtime.extras import ExtraProvider, provider_of
from triptych.runtime.method_runner import MethodRunner


@dataclass(frozen=True)
class LanguageMethod:
    """A `prefill` or `decode` method: its content input (`embeds` or `tokens`) and its extras."""

    name: str
    content: str
    extras: Mapping[str, ExtraProvider]
    takes_start_pos: bool

    @classmethod
    def of(cls, name: str, signature: MethodSignature) -> LanguageMethod:
        """Read a signature; raises `ArtifactError` where it is not one of a language method."""
        names = [port.name for port in signature.inputs]
        content = [port for port in names if port in ("embeds", "tokens")]
        if len(content) != 1:
            raise ArtifactError(f"{name} takes {', '.join(names)}; expected one of embeds and tokens: export again")
        if "logits" not in [port.name for port in signature.outputs]:
            raise ArtifactError(f"{name} has no output logits; export the model again")
        others = [port for port in names if port not in (content[0], "start_pos")]
        extras = {port: provider_of(name, port) for port in others}
        return cls(name, content[0], extras, "start_pos" in names)

    def run(self, runner: MethodRunner, content: Tensor, start: int) -> Tensor:
        """Run `content`, [1, S, D] embeds or [1, S] tokens, from position `start`; return the last logits, [1, V]."""
        size = content.shape[1]
        inputs = {self.content: content, **{name: provide(start, size) for name, provide in self.extras.items()}}
        if self.takes_start_pos:
            inputs["start_pos"] = torch.tensor([start], dtype=torch.int64)
        logits = runner.run(self.name, **inputs)["logits"]
        return logits[:, -1] if logits.dim() == 3 else logits


@dataclass(frozen=True)
class EntryPoints:
    """The methods that generation calls; None where the artifact has none for a role."""

    decode: LanguageMethod
    prefill: LanguageMethod | None
    token_embedding: str | None
    image_encoder: str | None

    @classmethod
    def of(cls, manifest: Manifest) -> EntryPoints:
        """Find the methods by role; raises `ArtifactError` where they cannot generate text together."""
        decode = _language_method(manifest, "decode")
        if decode is None:
            raise ArtifactError("the artifact has no method with the role decode; export a model that generates text")
        if decode.content != "tokens":
            raise ArtifactError(f"{decode.name} takes {decode.content}; expected tokens: export the model again")
        prefill = _language_method(manifest, "prefill")
        embedding = manifest.method_with_role("token_embedding")
        if prefill is not None and prefill.content == "embeds" and embedding is None:
            raise ArtifactError(
                f"{prefill.name} takes embeds, but no method has the role token_embedding; export again"
            )
        encoder = manifest.method_with_role("encoder(image)")
        if encoder is not None and manifest.image is None:
            raise ArtifactError(f"{encoder} takes images, but the manifest has no image settings; export again")
        if encoder is not None and (prefill is None or prefill.content != "embeds"):
            raise ArtifactError(f"{encoder} gives embeds, but no prefill method takes them; export the model again")
        return cls(decode, prefill, embedding, encoder)


def _language_method(manifest: Manifest, role: str) -> LanguageMethod | None:
    name = manifest.method_with_role(role)
    return None if name is None else LanguageMethod.of(name, manifest.methods[name])
