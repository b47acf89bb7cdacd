"""``triptych passes run`` and ``triptych passes diff``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from triptych.cli.console import Stages, quiet_libraries
from triptych.cli.passes.subject import load_model, load_oracle, model_options
from triptych.errors import UsageError

if TYPE_CHECKING:
    from triptych.compiler.cost import MethodCost
    from triptych.compiler.manager import Instrument, PassResult
    from triptych.compiler.model import Model
    from triptych.compiler.pipeline import Pipeline
    from triptych.compiler.program import Program

PICTURE_SUFFIXES = (".svg", ".html", ".json")


@click.command()
@click.argument("pipeline")
@model_options
@click.option(
    "--check",
    type=click.Choice(["structure", "numeric"]),
    default="structure",
    show_default=True,
    help="What is verified after each pass; numeric plays whole conversations against the eager model.",
)
@click.option("--tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Tokens decoded by the check.")
@click.option(
    "--print-ir",
    type=click.Choice(["before", "after", "changed"]),
    default=None,
    help="Print the program before, after, or after each pass that changed it.",
)
@click.option("--diff", "show_diff", is_flag=True, help="Print what each pass changed in the program's text.")
@click.option("--statistics", is_flag=True, help="Print the operators each pass added and took away, by method.")
@click.option("--coverage", "show_coverage", is_flag=True, help="Print what each pass did in each method, or why not.")
@click.option(
    "--cost", "show_cost", is_flag=True, help="Print the cost of each method and what each pass changed of it."
)
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="DIM=N",
    help="Size of a dynamic dimension for --cost, such as S=128; default: its maximum. May be given several times.",
)
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    default=None,
    help="Draw the result: FILE.svg the program, FILE.html the program and every method, FILE.json for Model Explorer.",
)
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Save the program into this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of tables.")
def run(pipeline: str, model_path: Path | None, max_context: int, tokens: int, **options: Any) -> None:
    """Run PIPELINE, such as "static-kv-cache,swap-sdpa,capture,last-token-logits", and say what each pass did."""
    quiet_libraries()
    from triptych.compiler.pipeline import parse
    from triptych.compiler.stages import Source

    parsed = parse(pipeline)
    picture: Path | None = options["picture"]
    _check_options(parsed, picture, options)
    watch = _Watch(options)
    with Stages(enabled=not options["as_json"]) as stages:
        stages("load model")
        model = load_model(model_path, max_context)
        if options["check"] == "numeric":
            watch.check_numbers(model, tokens)
        source = Source(model, report=stages, instruments=tuple(watch.instruments))
        transformed = source.transform(parsed.source)
        captured = transformed.capture().rewrite(parsed.program) if parsed.captures else None
        if picture is not None and captured is not None:
            stages("draw")
            _draw(captured.program, picture)
        if options["out"] is not None and captured is not None:
            stages("save")
            captured.save_program(options["out"])
    results, program = (transformed.results, None) if captured is None else (captured.results, captured.program)
    watch.show(results, program, as_json=options["as_json"])


def _check_options(pipeline: Pipeline, picture: Path | None, options: dict[str, Any]) -> None:
    """Refuse what cannot be done before any work."""
    if pipeline.captures:
        pass
    elif pipeline.program:
        raise UsageError(f"pipeline '{pipeline}' has no 'capture'; put it between source and graph passes")
    else:
        needing = [name for name in ("picture", "out", "show_cost") if options[name]]
        if needing:
            raise UsageError(f"--{needing[0].replace('show_', '')} needs a program; add 'capture' to '{pipeline}'")
    if picture is not None and picture.suffix not in PICTURE_SUFFIXES:
        raise UsageError(f"--picture {picture} ends in {picture.suffix!r}; known: {', '.join(PICTURE_SUFFIXES)}")


class _Watch:
    """The instruments that the options ask for, and how their findings are shown."""

    def __init__(self, options: dict[str, Any]) -> None:
        from triptych.compiler.instruments import CostWatch, Diff, PrintIR, Statistics

        self._options = options
        self.texts: list[str] = []
        self.instruments: list[Instrument] = []
        write = self.texts.append if options["as_json"] else click.echo
        self.statistics = Statistics()
        self.cost = CostWatch(_parsed_sizes(options["sizes"]))
        if options["print_ir"]:
            self.instruments.append(PrintIR(options["print_ir"], write))
        if options["show_diff"]:
            self.instruments.append(Diff(write))
        if options["statistics"]:
            self.instruments.append(self.statistics)
        if options["show_cost"]:
            self.instruments.append(self.cost)

    def check_numbers(self, model: Model, tokens: int) -> None:
        """Hold every stage to parity with `model`."""
        from triptych.compiler.instruments import NumericCheck

        self.numeric = NumericCheck(load_oracle(model, tokens))
        self.instruments.append(self.numeric)

    def show(self, results: tuple[PassResult, ...], program: Program | None, *, as_json: bool) -> None:
        """Print what was found."""
        from triptych.compiler.cost import program_cost
        from triptych.compiler.instruments import coverage

        methods = list(program.methods) if program is not None else []
        matrix = coverage(results, methods)
        if as_json:
            found: dict[str, Any] = {"passes": [asdict(one) for one in results]}
            if self._options["show_coverage"]:
                found["coverage"] = matrix
            if self._options["statistics"]:
                found["statistics"] = [asdict(one) for one in self.statistics.changes]
            if self._options["show_cost"] and program is not None:
                found["cost"] = {name: asdict(one) for name, one in program_cost(program, self.cost.sizes).items()}
                found["cost_deltas"] = {
                    name: {method: asdict(one) for method, one in delta.items()}
                    for name, delta in self.cost.deltas.items()
                }
            if self.texts:
                found["texts"] = self.texts
            click.echo(json.dumps(found, indent=2, default=str))
            return
        console = Console()
        _show_results(console, results)
        if self._options["show_coverage"]:
            _show_coverage(console, matrix, methods)
        if self._options["statistics"]:
            for one in self.statistics.changes:
                click.echo(f"{one.pass_name}: {one.method}: {one.count:+d} {one.operator}")
        if self._options["show_cost"] and program is not None:
            _show_cost(console, program_cost(program, self.cost.sizes), self.cost.deltas)
        if self._options["check"] == "numeric":
            click.echo("parity after every pass")


def _show_results(console: Console, results: tuple[PassResult, ...]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "matches", "refused", "changed", "ms", "checks ms"):
        table.add_column(column, justify="left" if column in ("pass", "changed") else "right")
    for one in results:
        row = (len(one.matches), len(one.refusals), "yes" if one.changed else "no")
        table.add_row(one.name, *map(str, row), f"{one.seconds * 1e3:.1f}", f"{one.check_seconds * 1e3:.1f}")
    console.print(table)


def _show_coverage(console: Console, matrix: dict[str, dict[str, str]], methods: list[str]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("pass", no_wrap=True)
    for column in (*methods, "all"):
        table.add_column(column, overflow="fold")
    for name, row in matrix.items():
        table.add_row(name, *(row.get(column, "") for column in (*methods, "all")))
    console.print(table)


def _show_cost(console: Console, costs: dict[str, MethodCost], deltas: dict[str, dict[str, MethodCost]]) -> None:
    """One table: the methods as they are at the end, then what each pass changed of them."""
    table = Table(box=None, pad_edge=False)
    for column in ("cost", "MFLOPs", "MB read", "MB written", "MB constants", "MB peak live"):
        table.add_column(column, justify="left" if column == "cost" else "right")
    rows = [(name, one, "") for name, one in costs.items()]
    rows += [
        (f"{method}, by {name}", one, "+")
        for name, delta in deltas.items()
        for method, one in delta.items()
        if any(asdict(one).values())
    ]
    for name, one, sign in rows:
        measures = (one.flops, one.bytes_read, one.bytes_written, one.constant_bytes, one.peak_live_bytes)
        table.add_row(name, *(f"{value / 1e6:{sign},.3f}" for value in measures))
    console.print(table)


@click.command()
@click.argument("first")
@click.argument("second")
@model_options
@click.option("--method", default=None, help="Compare one method only.")
def diff(first: str, second: str, model_path: Path | None, max_context: int, method: str | None) -> None:
    """Compare the programs that the pipelines FIRST and SECOND make of a model, line by line."""
    quiet_libraries()
    from triptych.compiler.instruments import subject_text, text_diff
    from triptych.compiler.pipeline import parse
    from triptych.compiler.stages import Source
    from triptych.compiler.text import method_text

    parsed = [parse(text) for text in (first, second)]
    for one in parsed:
        if not one.captures:
            raise UsageError(f"pipeline '{one}' has no 'capture'; put it between source and graph passes")
    texts = []
    with Stages() as stages:
        stages("load model")
        model = load_model(model_path, max_context)
        for one in parsed:
            program = Source(model, report=stages).transform(one.source).capture().rewrite(one.program).program
            if method is not None and method not in program.methods:
                raise UsageError(f"no method is called {method!r}; the program has {', '.join(program.methods)}")
            texts.append(method_text(method, program.methods[method]) if method else subject_text(program))
    click.echo(text_diff(texts[0], texts[1], first, second), nl=False)


def _draw(program: Program, path: Path) -> None:
    from triptych.pictures import model_explorer_json, picture_html, program_picture

    if path.suffix == ".json":
        text = json.dumps(model_explorer_json(program))
    else:
        text = picture_html(program) if path.suffix == ".html" else program_picture(program)
    path.write_text(text, encoding="utf-8")


def _parsed_sizes(sizes: tuple[str, ...]) -> dict[str, int]:
    parsed = {}
    for one in sizes:
        name, equals, number = one.partition("=")
        if not (name and equals and number.isdigit()):
            raise UsageError(f"--size {one!r} cannot be read; expected a dimension and a number, such as S=128")
        parsed[name] = int(number)
    return parsed
