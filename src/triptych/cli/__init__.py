"""The command line. Commands import what they need when they run, so ``triptych --help`` imports no torch."""

from __future__ import annotations

import sys

import click

from triptych import __version__
from triptych.cli.demo import demo
from triptych.cli.diff import diff
from triptych.cli.export import export
from triptych.cli.inspect import inspect
from triptych.cli.passes import passes
from triptych.cli.run import run
from triptych.cli.verify import verify
from triptych.errors import TriptychError, UsageError

INTERRUPTED_EXIT = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="triptych")
def commands() -> None:
    """Compile multimodal PyTorch models into artifacts and run them."""


for command in (export, run, inspect, diff, verify, passes, demo):
    commands.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors end in one line on standard error and a non-zero exit code."""
    try:
        code = commands.main(arguments, prog_name="triptych", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("interrupted", INTERRUPTED_EXIT)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED_EXIT)
    except click.ClickException as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        _fail(f"{error.format_message()}{hint}", error.exit_code)
    except UsageError as error:
        _fail(str(error), 2)
    except TriptychError as error:
        _fail(str(error), 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename or 'input or output'}; check the path and the disk", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(code)
