"""All pictures of a program on one HTML page, which loads nothing and prints a picture a page."""

from __future__ import annotations

from typing import Final

from jinja2 import Environment

from triptych.compiler.program import Program
from triptych.pictures.drawing import svg_text
from triptych.pictures.method_diagram import method_diagram
from triptych.pictures.program_diagram import program_diagram

_PAGE: Final = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Triptych: {{ pictures | map(attribute="title") | join(", ") }}</title>
<style>
body { margin: 0 auto; padding: 16px; font-family: system-ui, sans-serif; color: #1f2328; background: #ffffff }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin-bottom: 16px }
a { color: #0969da }
section { overflow-x: auto; margin-bottom: 32px }
svg { display: block; margin: 0 auto }
@media screen and (prefers-color-scheme: dark) {
body { color: #e6edf3; background: #0d1117 }
a { color: #4493f8 }
}
@media print {
nav { display: none }
body { padding: 0 }
section { break-after: page; overflow: visible; margin: 0 }
svg { max-width: 100%; max-height: 96vh; width: auto; height: auto }
}
</style>
</head>
<body>
<nav aria-label="Pictures">
{%- for picture in pictures %}
<a href="#picture-{{ loop.index }}">{{ picture.title }}</a>
{%- endfor %}
</nav>
{%- for picture in pictures %}
<section id="picture-{{ loop.index }}" aria-label="{{ picture.title }}">
{{ picture.svg | safe }}
</section>
{%- endfor %}
</body>
</html>
"""
_NAMESPACE: Final = ' xmlns="http://www.w3.org/2000/svg"'


def picture_html(program: Program) -> str:
    """Return a page with the picture of `program` and one of each method; raises `UsageError` without igraph.

    The page follows the light or dark setting of the reader's system; the boxes show more where the mouse rests.
    """
    drawn = [program_diagram(program), *(method_diagram(program, name) for name in program.methods)]
    # In HTML the name of the SVG namespace is implied.
    pictures = [{"title": picture.title, "svg": svg_text(picture).replace(_NAMESPACE, "", 1)} for picture in drawn]
    return Environment(autoescape=True).from_string(_PAGE).render(pictures=pictures)
