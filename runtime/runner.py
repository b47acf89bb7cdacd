"""`Runner`: an artifact's folder to text, in three lines of Python.

::

    runner = Runner.from_pretrained(Path("artifact"))
    result = runner.generate("What shapes are there?", images=["picture.png"], on_text=print)
    print(result.text, result.finish_reason, result.timings)
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from torch import Tensor

from triptych.errors import ArtifactError, RunError, UsageError
from triptych.manifest import ABI, EXECUTORCH_LLM_ABI, Manifest, token_ids
from triptych.runtime.chat import ChatMessage, images_of, render_chat, user_message
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.generation import GenerationResult, SamplingSettings, TextDecoder, TextTokenGenerator
from triptych.runtime.image_prefill import ImagePrefiller
from triptych.runtime.images import ImageSource, load_image, preprocess
from triptych.runtime.loaders import load_runner
from triptych.runtime.method_runner import MethodRunner
from triptych.runtime.prefill import TextPrefiller
from triptych.runtime.sampling import Sampler
from triptych.runtime.segments import Prompt, TextSegment, build_prompt
from triptych.runtime.session import Session
from triptych.runtime.timings import Timings
from triptych.runtime.tokenizers import TextStream, Tokenizer, load_tokenizer

DRIVEN_ABIS: Final = (ABI, EXECUTORCH_LLM_ABI)


class GenerationStream(Iterator[str]):
    """The text pieces of one generation as they come; `result` is there once they ended."""

    def __init__(
        self,
        generator: TextTokenGenerator,
        tokens: Iterator[int],
        tokenizer: Tokenizer,
        prompt_tokens: int,
        timings: Timings,
        started: float,
    ) -> None:
        """Wrap the token iterator of a generation that began at `started` (`time.perf_counter`)."""
        self._generator = generator
        self._prompt_tokens = prompt_tokens
        self._timings = timings
        self._started = started
        self._ids: list[int] = []
        self._text = ""
        self._pieces = self._decode(tokens, TextStream(tokenizer))

    def _decode(self, tokens: Iterator[int], stream: TextStream) -> Iterator[str]:
        for token in tokens:
            if not self._ids:
                self._timings.first_token = time.perf_counter() - self._started
            self._ids.append(token)
            yield stream.push(token)
        if not self._ids:
            self._timings.first_token = time.perf_counter() - self._started
        yield stream.flush()

    def __next__(self) -> str:
        piece = ""
        while not piece:
            piece = next(self._pieces)
        self._text += piece
        return piece

    @property
    def result(self) -> GenerationResult:
        """The whole generation; raises `RunError` before the last piece was taken."""
        reason = self._generator.finish_reason
        if reason is None:
            raise RunError("the generation has not ended; take all pieces of the stream first")
        return GenerationResult(self._text, tuple(self._ids), reason, self._prompt_tokens, self._timings)


class Runner(ABC):
    """Generates text with one artifact; `from_pretrained` gives a `TextRunner` or a `MultimodalRunner`.

    Each generation starts from an empty session.
    """

    def __init__(
        self, manifest: Manifest, methods: MethodRunner, tokenizer: Tokenizer, chunk_size: int | None = None
    ) -> None:
        """Join the parts; raises `ArtifactError` where the artifact's methods cannot generate text."""
        self.manifest = manifest
        self.methods = methods
        self.tokenizer = tokenizer
        self.load_seconds = 0.0
        self.session = Session(methods, manifest)
        self._kept = None if manifest.kept_tokens is None else frozenset(token_ids(manifest.kept_tokens))
        self._entry_points = EntryPoints.of(manifest)
        self._prefiller = TextPrefiller(self._entry_points, ImagePrefiller(methods, self._entry_points), chunk_size)
        self._decoder = TextDecoder(self._entry_points)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, threads: int | None = None, verify_files: bool = True, chunk_size: int | None = None
    ) -> Runner:
        """Load the artifact in `folder`.

        `threads` are CPU threads of the engine (None: its own choice); `verify_files` compares every file's
        sha256 with the manifest; `chunk_size` bounds the positions of one prefill call. Raises `ArtifactError`
        where the artifact is missing or broken, `UsageError` on an impossible option.
        """
        started = time.perf_counter()
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if verify_files:
            manifest.check_files(folder)
        if manifest.abi not in DRIVEN_ABIS:
            raise ArtifactError(
                f"{folder} keeps the ABI {manifest.abi!r}; this runner drives {' and '.join(DRIVEN_ABIS)}: export for "
                "one of them"
            )
        if manifest.tokenizer is None:
            raise ArtifactError(f"{folder} has no tokenizer; export the model with one, or drive its methods yourself")
        EntryPoints.of(manifest)
        tokenizer = load_tokenizer(folder / manifest.tokenizer, bos_id=manifest.bos_id, eos_ids=manifest.eos_ids)
        kind = TextRunner if manifest.image is None else MultimodalRunner
        methods = load_runner(folder, manifest, threads)
        try:
            runner = kind(manifest, methods, tokenizer, chunk_size)
        except BaseException:
            methods.close()
            raise
        runner.load_seconds = time.perf_counter() - started
        return runner

    @abstractmethod
    def _pixel_values(self, images: Sequence[ImageSource]) -> list[Tensor]:
        """Return each picture's `pixel_values`; raises `RunError` where pictures cannot be taken."""

    @abstractmethod
    def _user_message(self, text: str, images: Sequence[ImageSource]) -> ChatMessage:
        """Return the user message of a prompt in the form this kind of model's template reads."""

    @abstractmethod
    def _plain_prompt(self, text: str, images: Sequence[ImageSource]) -> str:
        """Return the text of a prompt without a chat template."""

    def generate(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        chat: bool = True,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Generate at most `max_new_tokens` tokens after `prompt`, or until the context is full.

        `chat` wraps the prompt into one user message, the images first, where the model has a chat template.
        `on_text` is called with each piece of text. Raises `RunError` on input that cannot run (image, prompt past
        the context) and `UsageError` on impossible settings; the runner stays usable.
        """
        stream = self.stream(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            chat=chat,
        )
        return _drain(stream, on_text)

    def stream(
        self,
        prompt: str,
        images: Sequence[ImageSource] = (),
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        chat: bool = True,
    ) -> GenerationStream:
        """Return an iterator over the text as it is generated; see `generate`.

        The prompt runs before this returns, so its errors are raised here.
        """
        if chat and self.manifest.chat.template is not None:
            text = render_chat([self._user_message(prompt, images)], self.manifest.chat)
            bos = False
        else:
            text = self._plain_prompt(prompt, images)
            bos = self.tokenizer.adds_bos
        settings = SamplingSettings(temperature, top_k, top_p)
        return self._start(text, images, bos, max_new_tokens, settings, seed)

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> GenerationResult:
        """Generate the answer to a list of messages in transformers' form, pictures in their image parts."""
        text = render_chat(messages, self.manifest.chat)
        settings = SamplingSettings(temperature, top_k, top_p)
        stream = self._start(text, images_of(messages), False, max_new_tokens, settings, seed)
        return _drain(stream, on_text)

    def _start(
        self,
        text: str,
        images: Sequence[ImageSource],
        bos: bool,
        max_new_tokens: int,
        settings: SamplingSettings,
        seed: int | None,
    ) -> GenerationStream:
        if max_new_tokens < 1:  # the generator would say so too, but only after the prefill
            raise UsageError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        if isinstance(images, str | Path):
            raise UsageError(f"images is {images!r}; expected a list of paths or pictures, also for one")
        self._decoder.check(settings)
        started = time.perf_counter()
        timings = Timings(load=self.load_seconds)
        with timings.measure("vision"):
            pictures = self._pixel_values(images)
        with timings.measure("tokenize"):
            prompt: Prompt = build_prompt(text, pictures, self.tokenizer, self.manifest.image, bos=bos)
            self._check_kept(prompt)
        self.session.reset()
        logits = self._prefiller.prefill(self.session, prompt, timings)
        generator = TextTokenGenerator(self._decoder, Sampler(seed), self.manifest.eos_ids)
        tokens = generator.generate(self.session, logits, max_new_tokens, settings, timings)
        return GenerationStream(generator, tokens, self.tokenizer, prompt.length, timings, started)

    def _check_kept(self, prompt: Prompt) -> None:
        """Raise `RunError` for a token that is not among those that the artifact kept."""
        if self._kept is None:
            return
        for segment in prompt.segments:
            for token in segment.tokens if isinstance(segment, TextSegment) else ():
                if token not in self._kept:
                    raise RunError(
                        f"the prompt has the token {token} ({self.tokenizer.decode([token])!r}), which is not among "
                        f"the {len(self._kept)} that prune-vocabulary kept; say it otherwise, or keep more tokens"
                    )

    def close(self) -> None:
        """Free the engine's memory. May be called twice."""
        self.methods.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TextRunner(Runner):
    """Runs an artifact that takes text only."""

    def _pixel_values(self, images: Sequence[ImageSource]) -> list[Tensor]:
        if images:
            raise RunError(f"{len(images)} image(s) given, but this artifact takes text only; leave them out")
        return []

    def _user_message(self, text: str, images: Sequence[ImageSource]) -> ChatMessage:
        return user_message(text, images, parts=False)

    def _plain_prompt(self, text: str, images: Sequence[ImageSource]) -> str:
        return text


class MultimodalRunner(Runner):
    """Runs an artifact that takes pictures and text."""

    def _pixel_values(self, images: Sequence[ImageSource]) -> list[Tensor]:
        settings, encoder = self.manifest.image, self._entry_points.image_encoder
        if settings is None or encoder is None:
            raise ArtifactError(
                "the artifact has image settings and no encoder, or the reverse; export the model again"
            )
        port = self.methods.signature(encoder).input("pixel_values")
        return [preprocess(load_image(image), settings, port) for image in images]

    def _user_message(self, text: str, images: Sequence[ImageSource]) -> ChatMessage:
        return user_message(text, images, parts=True)

    def _plain_prompt(self, text: str, images: Sequence[ImageSource]) -> str:
        """Put a placeholder for each picture before a text that has none of its own."""
        settings = self.manifest.image
        if settings is None or settings.token in text:
            return text
        return settings.token * len(images) + text


def _drain(stream: GenerationStream, on_text: Callable[[str], None] | None) -> GenerationResult:
    for piece in stream:
        if on_text is not None:
            on_text(piece)
    return stream.result
