"""The explanation of a partition: it counts what the file holds, and says why and from which line."""

import inspect
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cli.conftest import Command, triptych  # noqa: F401  # a fixture
from tests.compiler import tiny
from triptych.compiler.partition_explainer import (
    NO_DELEGATE,
    NOT_A_TENSOR,
    PARTITION_FILE,
    MethodPartition,
    OutsideOperator,
    Partition,
)
from triptych.compiler.targets.pte import read_pte
from triptych.errors import ArtifactError

SMALL = Partition(
    "xnnpack",
    {"decode": MethodPartition({"XnnpackBackend": 2}, 9, (OutsideOperator("aten::abs.out", 3, "why", ("m.py:1",)),))},
)


class OddAttention(tiny.TinyAttention):
    """Attention with two things that XNNPACK refuses: a softmax over another axis, and sorting."""

    def forward(self, x: Tensor) -> Tensor:
        halves = x.unflatten(-1, (2, -1))
        x = torch.softmax(halves, dim=2).flatten(-2) + x
        largest = torch.sort(x, dim=-1, descending=True)[0]
        return super().forward(x) + largest


def line_of(text: str) -> str:
    lines, first = inspect.getsourcelines(OddAttention)
    (found,) = [first + index for index, line in enumerate(lines) if text in line]
    return f"{Path(__file__).name}:{found}"


def lowered(target: str, folder: Path) -> Path:
    model = tiny.tiny(OddAttention())
    return tiny.captured(model).rewrite("last-token-logits").lower(target).save(folder / target).path


@pytest.fixture(scope="module")
def xnnpack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered("xnnpack", tmp_path_factory.mktemp("explained"))


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered("portable", tmp_path_factory.mktemp("explained"))


def outside(folder: Path, method: str) -> dict[str, OutsideOperator]:
    return {one.operator: one for one in Partition.load(folder).methods[method].outside}


# ------------------------------------------------------------------------------------------------ counts


@pytest.mark.slow
@pytest.mark.parametrize("target", ["xnnpack", "portable"])
def test_it_counts_the_delegates_and_kernel_calls_of_the_file(target: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(target)
    partition, file = Partition.load(folder), read_pte(folder / "model.pte")
    assert partition.target == target
    assert set(partition.methods) == set(file.methods) == {"token_embedding", "prefill", "decode"}
    for name, method in partition.methods.items():
        counted: Counter[str] = Counter()
        for one in method.outside:
            counted[one.operator] += one.count
        assert counted == Counter(file.methods[name].operators)
        assert method.delegates == file.methods[name].delegates
        assert method.outside_calls == sum(file.methods[name].operators.values())
        assert (method.delegated_operators > 0) == bool(method.delegates)


# ------------------------------------------------------------------------------------------------ reasons and lines


@pytest.mark.slow
def test_a_refused_constraint_is_told_in_xnnpacks_words_with_the_line(xnnpack: Path) -> None:
    softmax = outside(xnnpack, "decode")["aten::_softmax.out"]
    assert softmax.reason == "XNNPACK: dim must be the last dim, got dim = 2 for tensor of rank 4"
    assert softmax.lines == (line_of("torch.softmax("),)


@pytest.mark.slow
def test_an_operator_without_a_rule_is_told_so_with_the_line(xnnpack: Path) -> None:
    sort = next(one for name, one in outside(xnnpack, "decode").items() if name.startswith("aten::sort"))
    assert sort.reason == "XNNPACK has no rule for this operator"
    assert sort.lines == (line_of("torch.sort"),)


@pytest.mark.slow
def test_kernels_of_other_libraries_and_numbers_have_reasons_of_their_own(xnnpack: Path) -> None:
    found = outside(xnnpack, "prefill")
    assert found["llama::custom_sdpa.out"].reason == "a kernel of llama::, called as it is"
    assert found["llama::update_cache.out"].count == 2
    assert found["aten::_local_scalar_dense"].reason == NOT_A_TENSOR


@pytest.mark.slow
def test_integers_and_symbolic_sizes_are_told_apart(xnnpack: Path) -> None:
    """XNNPACK says "invalid dtype" of both."""
    assert outside(xnnpack, "decode")["aten::add.out"].reason == "XNNPACK: invalid dtype, int64"
    reasons = [one.reason for one in outside(xnnpack, "prefill").values()]
    assert [one for one in reasons if "symbolic size" in one or "SymInt" in one], reasons
    assert "XNNPACK: invalid dtype" not in reasons


@pytest.mark.slow
def test_without_delegates_there_is_one_reason(portable: Path) -> None:
    for method in Partition.load(portable).methods.values():
        assert method.delegates == {}
        assert {one.reason for one in method.outside} == {NO_DELEGATE}
    assert outside(portable, "decode")["aten::_softmax.out"].count == 2
    assert line_of("torch.softmax(") in outside(portable, "decode")["aten::_softmax.out"].lines


@pytest.mark.slow
def test_the_explanation_names_no_path_and_is_hashed(xnnpack: Path) -> None:
    from triptych.manifest import Manifest

    text = (xnnpack / PARTITION_FILE).read_text()
    assert str(Path(__file__).parent) not in text
    assert PARTITION_FILE in Manifest.load(xnnpack).files


# ------------------------------------------------------------------------------------------------ reading


def test_it_reads_back_as_it_was(tmp_path: Path) -> None:
    (tmp_path / PARTITION_FILE).write_text(SMALL.to_json())
    assert Partition.load(tmp_path) == SMALL


def test_an_artifact_without_one_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no partition\.json: only artifacts of ExecuTorch targets"):
        Partition.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "is damaged: JSONDecodeError"),
        ("[]", "is damaged: TypeError"),
        ('{"format": "triptych-partition", "version": 1}', "is damaged: KeyError 'methods'"),
        ('{"format": "triptych-partition", "version": 9}', "has format triptych-partition 9, expected"),
    ],
)
def test_a_damaged_explanation_is_an_artifact_error(text: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=f"here.json {message}"):
        Partition.from_json(text, "here.json")


# ------------------------------------------------------------------------------------------------ command line


@pytest.mark.slow
def test_the_command_prints_reasons_and_lines(xnnpack: Path, triptych: Command) -> None:  # noqa: F811
    outcome = triptych("inspect", xnnpack, "--partition")
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.out.split("method prefill")[0].splitlines() if "_softmax" in line]
    assert line.strip() == (
        "1 aten::_softmax.out: XNNPACK: dim must be the last dim, got dim = 2 for tensor of rank 4 "
        f"[{line_of('torch.softmax(')}]"
    )
    as_json = triptych("inspect", xnnpack, "--partition", "--json")
    assert Partition.from_json(as_json.out) == Partition.load(xnnpack)


def test_an_eager_artifact_has_nothing_to_explain(tmp_path: Path, triptych: Command) -> None:  # noqa: F811
    saved = tiny.captured(tiny.tiny(layers=1)).lower("eager").save(tmp_path / "artifact")
    outcome = triptych("inspect", saved.path, "--partition")
    assert outcome.code == 1
    assert "has no partition.json" in outcome.error
