"""``triptych run``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from triptych.cli.console import quiet_libraries


class _Printer:
    """Prints pieces of text as they come, without the space that an answer's first token begins with."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, text: str) -> None:
        piece = text if self._begun else text.lstrip()
        self._begun = self._begun or bool(piece)
        click.echo(piece, nl=False)


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", required=True, help="What to say; wrapped in the model's chat template where it has one.")
@click.option(
    "--image", "images", multiple=True, type=click.Path(path_type=Path), help="A picture; may be given several times."
)
@click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Most tokens to generate.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 picks the most likely token.")
@click.option("--seed", type=int, default=None, help="Makes sampling repeatable.")
@click.option("--threads", type=int, default=None, help="Threads of the engine. Default: its own choice.")
@click.option("--raw", is_flag=True, help="Give the prompt to the model as it is, without the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, tokens and timings.")
def run(  # noqa: PLR0917 (click passes options by name)
    folder: Path,
    prompt: str,
    images: tuple[Path, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    threads: int | None,
    raw: bool,
    as_json: bool,
) -> None:
    """Generate text with the artifact in DIR; text streams as it is generated."""
    quiet_libraries()
    from triptych.api import load

    with load(folder, threads=threads) as runner:
        result = runner.generate(
            prompt,
            images,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            chat=not raw,
            on_text=None if as_json else _Printer(),
        )
    if as_json:
        data = {
            "text": result.text.lstrip(),
            "tokens": list(result.tokens),
            "finish_reason": result.finish_reason,
            "prompt_tokens": result.prompt_tokens,
            "prefill_tokens_per_second": result.prefill_tokens_per_second,
            "decode_tokens_per_second": result.decode_tokens_per_second,
            "seconds": dataclasses.asdict(result.timings),
        }
        click.echo(json.dumps(data, ensure_ascii=False))
    else:
        click.echo()
