"""The mutation engine on a small model: what it finds, what it makes of it, and whom it gives the credit."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from tests.compiler import tiny
from triptych.compiler.fingerprint import fingerprint
from triptych.compiler.model import Model
from triptych.compiler.oracle import Oracle
from triptych.compiler.program import Program
from triptych.compiler.trace_plans import Subject, make_plans, subject_of
from triptych.errors import UsageError, VerificationError
from triptych.testing.mutation import KINDS, Mutation, Verdict, apply, judge, mutations, sample, survivors


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny.tiny()


@pytest.fixture(scope="module")
def program(model: Model) -> Program:
    return tiny.captured(model).rewrite("last-token-logits,legalize-aten").program


@pytest.fixture(scope="module")
def oracle(model: Model) -> Oracle:
    return Oracle(model, make_plans(subject_of(model), tokens=2, prompt_lengths=(1, 6)))


def prints(program: Program) -> dict[str, int]:
    return {name: fingerprint(method.exported) for name, method in program.methods.items()}


def details(program: Program, kind: str, method: str = "prefill") -> Counter[str]:
    return Counter(one.detail for one in mutations(program, kinds=[kind]) if one.method == method)


def one_of(program: Program, kind: str, method: str, detail: str) -> Mutation:
    found = mutations(program, kinds=[kind])
    return next(one for one in found if one.method == method and one.detail.startswith(detail))


# ---------------------------------------------------------------------------------------------------- what is found


def test_mutations_are_the_same_each_time_and_each_occurs_once(program: Program) -> None:
    found = list(mutations(program))
    assert found == list(mutations(program))
    assert len(set(found)) == len(found) > 500
    assert {one.kind for one in found} == set(KINDS)
    assert {one.method for one in found} == {"token_embedding", "prefill", "decode"}
    assert {one.layer for one in found} == {None, "blocks.0", "blocks.1"}


def test_kinds_can_be_chosen(program: Program) -> None:
    wanted = [one for one in mutations(program) if one.kind in ("mask", "alias")]
    assert set(mutations(program, kinds=["mask", "alias"])) == set(wanted)
    with pytest.raises(UsageError, match="'nonsense' is no kind of mutation; the kinds are operand, constant"):
        next(mutations(program, kinds=["mask", "nonsense"]))


def test_cache_writes_are_found_although_they_have_no_result(program: Program) -> None:
    writes = details(program, "alias")
    rows = [
        f"blocks.{layer}.attention.routed_attention.cache.{part}" for layer in (0, 1) for part in ("keys", "values")
    ]
    for row in rows:
        assert writes[f"writes to a copy of {row}"] == 1
        assert writes[f"adds to what {row} holds"] == 1
        assert writes[f"reads {row} as it was before the call"] == 1
    assert writes["a row of the method's own"] == 4


def test_positions_and_masks_of_cached_attention_are_found(program: Program) -> None:
    assert details(program, "mask") == {"le becomes lt": 2, "inverted": 2, "mask left out": 2}
    found = details(program, "position")
    # Per layer: slots of keys and of values, queries; and once the learned positions.
    assert found["start_pos is one too high"] == found["start_pos is taken for 0"] == 2 * 3 + 1
    # As many, and per layer the slots that queries are compared with.
    assert found["counts from 1"] == 2 * 4 + 1


def test_parts_and_heads_are_found(program: Program) -> None:
    found = details(program, "part")
    assert {f"part {index} becomes {other}" for index, other in ((0, 1), (1, 0), (2, 0))} <= set(found)
    assert details(program, "axes")["last axis split the other way round"] == 2 * 3
    assert details(program, "axes")["last axes merged the other way round"] == 2


class MaskedAttention(tiny.TinyAttention):
    """Attention without a cache, spelled out, with a mask of its own."""

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.split(x)
        length = x.shape[1]
        seen = torch.ones(length, length).tril(diagonal=0) > 0.5
        scores = (query @ key.transpose(-1, -2)) / 4.0
        return self.merge(torch.where(seen, scores, float("-inf")).softmax(-1) @ value)


def test_a_mask_that_is_spelled_out_is_found() -> None:
    found = list(
        mutations(tiny.captured(tiny.tiny(MaskedAttention()), "").program, kinds=["mask", "operand", "constant"])
    )
    texts = {one.detail for one in found if one.method == "prefill"}
    assert {"diagonal 0 becomes -1", "diagonal 0 becomes 1", "gt becomes ge", "inverted"} <= texts
    assert {"other 4 becomes 4.04", "eps 1e-05 becomes 1"} <= texts


def test_a_sample_is_even_over_kinds_methods_and_layers(program: Program) -> None:
    found = list(mutations(program))
    chosen = sample(found, 120, seed=1)
    assert chosen == sample(found, 120, seed=1) != sample(found, 120, seed=2)
    assert len(set(chosen)) == 120
    kinds = Counter(one.kind for one in chosen)
    rare = {kind for kind, count in Counter(one.kind for one in found).items() if count < 120 / len(KINDS)}
    assert set(kinds) == set(KINDS)
    assert max(kinds.values()) - min(count for kind, count in kinds.items() if kind not in rare) <= 1
    signs = Counter((one.method, one.layer) for one in chosen if one.kind == "sign")
    assert max(signs.values()) - min(signs.values()) <= 1
    assert len(sample(found, len(found) + 1)) == len(found)


# ---------------------------------------------------------------------------------------------------- what it makes


def test_a_variant_differs_in_its_method_alone_and_the_program_stays_as_it_is(program: Program) -> None:
    before = prints(program)
    refused = 0
    for mutation in sample(mutations(program), 48):
        try:
            mutated = prints(apply(program, mutation))
        except VerificationError:
            refused += 1
            continue
        assert {name for name in before if mutated[name] != before[name]} == {mutation.method}, str(mutation)
    assert refused <= 5
    assert prints(program) == before


@pytest.mark.parametrize(
    "wrong",
    [
        Mutation("sign", "prefill", "nowhere", "negated"),
        Mutation("sign", "nowhere", "add", "negated"),
        Mutation("nonsense", "prefill", "add", "negated"),
    ],
)
def test_a_mutation_of_another_program_is_an_error(program: Program, wrong: Mutation) -> None:
    with pytest.raises(UsageError, match=r"the program has no place for the mutation '.* in .*: negated'"):
        apply(program, wrong)


# ---------------------------------------------------------------------------------------------------- who catches it


@pytest.mark.parametrize(
    ("kind", "method", "detail", "catcher", "reason"),
    [
        ("alias", "decode", "in the storage of", "verifier", "share one storage"),
        ("output", "prefill", "last element left out", "verifier", "needs an output 'logits' over 48 tokens"),
        ("output", "token_embedding", "returned in bfloat16", "verifier", "bfloat16 is produced, float32 is taken"),
        ("part", "prefill", "the last but one", "run time", "prefill fails on inputs of"),
        ("position", "decode", "start_pos is taken for 0", "oracle", "random ids"),
        ("alias", "decode", "a row of the method's own", "oracle", "no counterpart"),
        # Slots are written once from zero in a first conversation; only where they hold something does this show.
        ("alias", "prefill", "adds to what", "oracle", "random ids"),
    ],
)
def test_who_catches_what(
    program: Program, oracle: Oracle, kind: str, method: str, detail: str, catcher: str, reason: str
) -> None:
    verdict = judge(program, oracle, one_of(program, kind, method, detail))
    assert verdict.caught_by == catcher, str(verdict)
    assert reason in verdict.reason
    assert verdict.moved != verdict.moved


def test_survivors_come_with_how_far_they_move_and_every_verdict_is_reported(program: Program, oracle: Oracle) -> None:
    """The norms of the fresh model have a bias of zeros, so a model without it is the same."""
    chosen = [
        one_of(program, "dropped", "decode", "bias left out"),
        one_of(program, "sign", "decode", "negated"),
        one_of(program, "alias", "decode", "in the storage of"),
    ]
    seen: list[Verdict] = []
    (left,) = survivors(program, oracle, chosen, seen.append)
    assert [verdict.mutation for verdict in seen] == chosen
    assert [verdict.caught_by for verdict in seen] == [None, "oracle", "verifier"]
    assert left is seen[0]
    assert 0 <= left.moved < 1e-5
    assert 0 <= left.kl < 1e-9
    assert "survives, moves outputs by" in str(left)


def test_a_weight_is_wrong_in_one_method_only(program: Program, oracle: Oracle) -> None:
    mutation = one_of(program, "weight", "decode", "scaled by 1.01")
    mutated = apply(program, mutation)
    weights = {
        name: next(
            value for key, value in method.exported.state_dict.items() if key.removesuffix("_scaled") == mutation.place
        )
        for name, method in mutated.methods.items()
        if name != "token_embedding"
    }
    torch.testing.assert_close(weights["decode"], weights["prefill"] * 1.01)
    assert judge(program, oracle, mutation).reason.split(": ", 1)[1].startswith("decode@")


# ---------------------------------------------------------------------------------------------------- conversations


@pytest.mark.parametrize(("slots", "filled"), [(127, False), (128, True), (300, True), (301, False)])
def test_a_context_that_narrow_positions_cannot_count_is_filled_once(slots: int, filled: bool) -> None:
    plans = {plan.name: plan for plan in make_plans(Subject(100, slots), 3, (1,))}
    assert ("whole context" in plans) is filled
    if filled:
        assert sum(step.count for step in plans["whole context"].steps) == slots
        assert len(plans["whole context"].draw(0).tokens) == slots
