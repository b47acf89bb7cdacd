"""Chat messages to prompt text, by the model's Jinja template.

Messages have transformers' form: ``{"role": ..., "content": text or parts}``, where a part is ``{"type": "text",
"text": ...}`` or ``{"type": "image", "image": path or picture}``. The environment is configured like the one in
``transformers/utils/chat_template_utils.py``; templates come with models, so they run sandboxed and see plain
data only.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from triptych.errors import RunError
from triptych.manifest import ChatSettings
from triptych.runtime.images import ImageSource

ChatMessage = Mapping[str, Any]

_IMAGE_KEYS: Final = ("image", "path")


def user_message(text: str, images: Sequence[ImageSource], *, parts: bool) -> dict[str, Any]:
    """Return one user message, the images before the text; without `parts`, content is the plain text."""
    if not parts:
        return {"role": "user", "content": text}
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def images_of(messages: Sequence[ChatMessage]) -> list[ImageSource]:
    """Return the pictures in the messages, in order; raises `RunError` on an image part that names none."""
    images: list[ImageSource] = []
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else []:
            if part.get("type") == "image":
                image = next((part[key] for key in _IMAGE_KEYS if key in part), None)
                if image is None:
                    raise RunError(f"an image part has no picture; give a path or a PIL image under {_IMAGE_KEYS[0]!r}")
                images.append(image)
    return images


def render_chat(messages: Sequence[ChatMessage], settings: ChatSettings, add_generation_prompt: bool = True) -> str:
    """Return the prompt text of `messages`; raises `RunError` where there is no template or it fails."""
    if settings.template is None:
        raise RunError("this model has no chat template; give a plain prompt")
    special = {"bos_token": settings.bos_token, "eos_token": settings.eos_token}
    try:
        return _compiled(settings.template).render(
            messages=[_plain(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{name: token for name, token in special.items() if token is not None},
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise RunError(f"the chat template failed: {error}; check roles and contents of the messages") from error


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Dump JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 (templates want the user's local date)


def _plain(value: Any) -> Any:
    """Rebuild a value from JSON types, so that a template cannot reach methods of pictures and other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"
