"""Every command and option explains itself."""

import click
import pytest

from tests.cli.conftest import Command
from triptych.cli import commands

COMMANDS = ("export", "run", "inspect", "verify", "demo")
OPTIONS = {
    "export": {"--out", "--target", "--recipe", "--pipeline", "--max-context", "--abi"},
    "run": {"--prompt", "--image", "--max-new-tokens", "--temperature", "--json"},
    "inspect": {"--json"},
    "verify": {"--against", "--tokens", "--max-kl", "--json"},
    "demo": {"--out"},
}


def test_the_commands_are_these() -> None:
    assert set(COMMANDS) <= set(commands.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_with_a_sentence(triptych: Command, name: str) -> None:
    outcome = triptych(name, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    options = [one for one in commands.commands[name].params if isinstance(one, click.Option)]
    written = {option for one in options for option in one.opts}
    assert written >= OPTIONS[name]
    text = " ".join(outcome.out.split())
    for option in options:
        assert option.help, f"{option.opts} has no help"
        assert len(option.help.split()) >= 3, f"{option.opts}: {option.help!r} explains nothing"
        assert option.help.endswith("."), f"{option.opts}: {option.help!r} is no sentence"
        assert option.opts[0] in text
        assert " ".join(option.help.split()[:3]) in text


@pytest.mark.parametrize("name", COMMANDS)
def test_option_names_are_words(name: str) -> None:
    for option in commands.commands[name].params:
        if isinstance(option, click.Option):
            assert all(one in ("-h", "--help") or (one.startswith("--") and len(one) >= 5) for one in option.opts)


def test_the_version_is_the_packages(triptych: Command) -> None:
    from importlib.metadata import version

    assert version("triptych") in triptych("--version").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("warp",), "No such command 'warp'"),
        (("export",), "Missing argument 'MODEL'"),
        (("export", "model"), "Missing option '--out'"),
        (("export", "model", "--out", "x", "--speed", "9"), "No such option"),
        (("export", "model", "--out", "x", "--max-context", "long"), "'long' is not a valid integer"),
        (("run", "x"), "Missing option '--prompt'"),
        (("verify", "x"), "Missing option '--against'"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_a_hint(
    triptych: Command, arguments: tuple[str, ...], message: str
) -> None:
    outcome = triptych(*arguments)
    assert outcome.code == 2
    assert message in outcome.error
    assert "--help" in outcome.error
