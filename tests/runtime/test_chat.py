from typing import Any

import pytest
from PIL import Image
from transformers.utils.chat_template_utils import render_jinja_template

from triptych.errors import RunError
from triptych.manifest import ChatSettings
from triptych.runtime.chat import images_of, render_chat, user_message

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {
        "role": "user",
        "content": [{"type": "image", "image": Image.new("RGB", (2, 2))}, {"type": "text", "text": "Hi é"}],
    },
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": [{"type": "text", "text": "Again"}]},
]

TEMPLATES = [
    # whitespace as trim_blocks and lstrip_blocks leave it, loop controls, tojson, namespace, generation tag
    """{{ bos_token }}
{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
<{{ m.role }}>{{ m.content | tojson }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
A:
{% endif %}""",
    """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{% if ns.n > 2 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{% endfor %}{{ ns.n }}""",
    "{% for m in messages %}{% generation %}{{ m.role }}{% endgeneration %}{% endfor %}",
    "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(template: str, prompt: bool) -> None:
    settings = ChatSettings(template, "<s>", "</s>")
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
    )
    assert render_chat(MESSAGES, settings, add_generation_prompt=prompt) == expected[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "the chat template failed"),
        ("{{ messages[9].role }}", "undefined|no element"),
        ("{{ messages.append(1) }}", "unsafe|not safely"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages + 1 }}", "failed"),
    ],
)
def test_template_errors(template: str, message: str) -> None:
    with pytest.raises(RunError, match=message):
        render_chat(MESSAGES, ChatSettings(template))


def test_no_template() -> None:
    with pytest.raises(RunError, match="no chat template"):
        render_chat(MESSAGES, ChatSettings(None))


def test_templates_see_no_objects() -> None:
    shown = render_chat(MESSAGES, ChatSettings("{{ messages[1].content[0].image }}"))
    assert shown == "<Image>"


def test_pictures_of_messages_in_order() -> None:
    image = Image.new("RGB", (1, 1))
    parts = [{"type": "image", "path": "b.png"}, {"type": "text", "text": "?"}, {"type": "image", "image": image}]
    messages = [user_message("x", ["a.png"], parts=True), {"role": "user", "content": parts}]
    assert images_of(messages) == ["a.png", "b.png", image]
    assert user_message("x", [], parts=False) == {"role": "user", "content": "x"}
    with pytest.raises(RunError, match="has no picture"):
        images_of([{"role": "user", "content": [{"type": "image"}]}])
