"""Which method plays which part in generation, read from the roles in the manifest and checked at load time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.errors import ArtifactError
from triptych.manifest import CHOSEN_TOKEN, Manifest, MethodSignature
from triptych.runtime.extras import ExtraProvider, provider_of
from triptych.runtime.method_runner import MethodRunner


@dataclass(frozen=True)
class LanguageMethod:
    """A `prefill` or `decode` method: its content input (`embeds` or `tokens`) and its extras.

    `output` is "logits", or "token" where the method chooses the most likely token itself.
    """

    name: str
    content: str
    extras: Mapping[str, ExtraProvider]
    takes_start_pos: bool
    output: str = "logits"

    @classmethod
    def of(cls, name: str, signature: MethodSignature) -> LanguageMethod:
        """Read a signature; raises `ArtifactError` where it is not one of a language method."""
        names = [port.name for port in signature.inputs]
        content = [port for port in names if port in ("embeds", "tokens")]
        if len(content) != 1:
            raise ArtifactError(f"{name} takes {', '.join(names)}; expected one of embeds and tokens: export again")
        given = [port.name for port in signature.outputs]
        output = next((port for port in ("logits", CHOSEN_TOKEN) if port in given), None)
        if output is None:
            raise ArtifactError(f"{name} has no output logits or {CHOSEN_TOKEN}; export the model again")
        others = [port for port in names if port not in (content[0], "start_pos")]
        extras = {port: provider_of(name, port) for port in others}
        return cls(name, content[0], extras, "start_pos" in names, output)

    def run(self, runner: MethodRunner, content: Tensor, start: int) -> Tensor:
        """Run `content`, [1, S, D] embeds or [1, S] tokens, from position `start`.

        Returns the last logits, [1, V], or the token that the method chose, int64 [1, 1].
        """
        size = content.shape[1]
        inputs = {self.content: content, **{name: provide(start, size) for name, provide in self.extras.items()}}
        if self.takes_start_pos:
            inputs["start_pos"] = torch.tensor([start], dtype=torch.int64)
        given = runner.run(self.name, **inputs)[self.output]
        return given[:, -1] if given.dim() == 3 else given


@dataclass(frozen=True)
class EntryPoints:
    """The methods that generation calls; None where the artifact has none for a role.

    `prefill_first` takes the place of `prefill` at position 0, and only there.
    """

    decode: LanguageMethod
    prefill: LanguageMethod | None
    token_embedding: str | None
    image_encoder: str | None
    prefill_first: LanguageMethod | None = None

    @property
    def chooses_tokens(self) -> bool:
        """True where decode gives the most likely token in place of logits, so that nothing can be sampled."""
        return self.decode.output == CHOSEN_TOKEN

    @classmethod
    def of(cls, manifest: Manifest) -> EntryPoints:
        """Find the methods by role; raises `ArtifactError` where they cannot generate text together."""
        decode = _language_method(manifest, "decode")
        if decode is None:
            raise ArtifactError("the artifact has no method with the role decode; export a model that generates text")
        prefill = _language_method(manifest, "prefill")
        embedding = manifest.method_with_role("token_embedding")
        for method in (prefill, decode):
            if method is not None and method.content == "embeds" and embedding is None:
                raise ArtifactError(
                    f"{method.name} takes embeds, but no method has the role token_embedding; export again"
                )
        encoder = manifest.method_with_role("encoder(image)")
        if encoder is not None and manifest.image is None:
            raise ArtifactError(f"{encoder} takes images, but the manifest has no image settings; export again")
        # An encoder that gives none writes state, which any prefill method may read.
        gives_embeds = encoder is not None and "embeds" in [port.name for port in manifest.methods[encoder].outputs]
        if encoder is not None and (prefill is None or (gives_embeds and prefill.content != "embeds")):
            raise ArtifactError(f"{encoder} gives embeds, but no prefill method takes them; export the model again")
        first = _language_method(manifest, "prefill_first")
        if first is not None and (first.takes_start_pos or prefill is None or first.content != prefill.content):
            raise ArtifactError(
                f"{first.name} has the role prefill_first; expected no start_pos, and a prefill method that takes "
                f"{first.content} too: export the model again"
            )
        return cls(decode, prefill, embedding, encoder, first)

    def content_of(self, runner: MethodRunner, method: LanguageMethod, tokens: Sequence[int]) -> Tensor:
        """Return what `method` takes for `tokens`: [1, S], or their embeddings [1, S, D]."""
        content = torch.tensor([tokens], dtype=torch.int64)
        if method.content == "tokens" or self.token_embedding is None:
            return content
        return runner.run(self.token_embedding, tokens=content)["embeds"]


def _language_method(manifest: Manifest, role: str) -> LanguageMethod | None:
    name = manifest.method_with_role(role)
    return None if name is None else LanguageMethod.of(name, manifest.methods[name])
