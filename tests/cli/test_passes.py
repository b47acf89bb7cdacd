"""``triptych passes``: what it prints, and one line for everything that cannot be done."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

FAST = ("--max-context", "24")


def test_list_names_every_pass_with_its_kind(triptych: Command) -> None:
    done = triptych("passes", "list", "--json")
    kinds = {one["name"]: one["kind"] for one in json.loads(done.out)}
    assert done.code == 0
    assert kinds["static-kv-cache"] == "source"
    assert kinds["last-token-logits"] == "graph"
    assert kinds["assert-cost"] == "program"
    assert "built in" in triptych("passes", "list").out


def test_show_prints_the_page_and_writes_all_pages(triptych: Command, tmp_path: Path) -> None:
    assert triptych("passes", "show", "static-kv-cache").out.startswith("# static-kv-cache\n")
    assert triptych("passes", "show", "--out", tmp_path / "pages").code == 0
    assert (tmp_path / "pages" / "quantize.md").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "no-such-pass"), "no pass is called 'no-such-pass'; known: "),
        (("show",), "name one pass to show, or give --out DIR"),
        (("run", "swap-sdpa,capture"), "swap-sdpa requires kv-cache"),
        (("run", "last-token-logits"), "has no 'capture'"),
        (("run", "static-kv-cache", "--cost"), "--cost needs a program; add 'capture'"),
        (("run", "static-kv-cache", "--out", "folder"), "--out needs a program"),
        (("run", "capture", "--picture", "a.gif"), "--picture a.gif ends in '.gif'; known: .svg, .html, .json"),
        (("run", "capture", "--cost", "--size", "S"), "--size 'S' cannot be read"),
        (("run", "capture", "--check", "perhaps"), "'perhaps' is not one of"),
        (("run", "capture", "--model", "no/such/folder"), "no/such/folder"),
        (("explain", "a,b"), "no pass is called 'a'"),
        (("explain", "swap-sdpa", "--after", "static-kv-cache,capture"), "swap-sdpa runs before capture"),
        (("explain", "last-token-logits", "--after", "static-kv-cache"), "last-token-logits runs after capture"),
        (("diff", "static-kv-cache", "capture"), "has no 'capture'"),
        (("bisect", "nothing-such"), "no pass is called 'nothing-such'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_done_is_one_line(triptych: Command, arguments: tuple[str, ...], message: str) -> None:
    done = triptych("passes", *arguments)
    assert done.code != 0
    assert message in done.error


def test_run_tells_everything_as_json(triptych: Command, tmp_path: Path) -> None:
    pipeline = "static-kv-cache,swap-sdpa,capture,last-token-logits"
    watch = ("--coverage", "--cost", "--size", "S=8", "--statistics", "--diff")
    done = triptych(
        "passes",
        "run",
        pipeline,
        *FAST,
        *watch,
        "--picture",
        tmp_path / "p.json",
        "--out",
        tmp_path / "program",
        "--json",
    )
    found = json.loads(done.out)
    assert [one["name"] for one in found["passes"]] == pipeline.replace("capture,", "").split(",")
    assert found["coverage"]["last-token-logits"]["decode"] == "1 matches"
    assert found["coverage"]["last-token-logits"]["vision_encoder"] == "no candidate"
    assert found["cost_deltas"]["last-token-logits"]["prefill"]["flops"] < 0 < found["cost"]["prefill"]["flops"]
    added = {one["operator"] for one in found["statistics"] if one["count"] > 0}
    assert added == {"aten.select.int", "aten.slice.Tensor"}
    assert any("+    aten.select.int" in text for text in found["texts"])
    assert len(json.loads((tmp_path / "p.json").read_text())["graphs"]) == 4
    assert "decode" in triptych("inspect", tmp_path / "program").out


def test_an_unknown_dimension_is_one_line(triptych: Command) -> None:
    done = triptych("passes", "run", "static-kv-cache,capture", *FAST, "--cost", "--size", "Q=8")
    assert done.code == 2
    assert "Q" in done.error


def test_bisect_exits_with_0_where_nothing_is_guilty(triptych: Command) -> None:
    done = triptych("passes", "bisect", "static-kv-cache,swap-sdpa", *FAST, "--tokens", "2", "--json")
    assert done.code == 0
    assert json.loads(done.out) == {"guilty": None, "reproducer": None}
