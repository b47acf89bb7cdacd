"""What the legalizing passes and `expand-tanh-gelu` leave in the graph, and that it still computes the same."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from tests.modules import cases
from tests.modules.engines import captured_calls
from triptych.compiler.model import CONTEXT, EntryPoint, Metadata, Model, OutputPort
from triptych.compiler.program import Program
from triptych.compiler.roles import OTHER
from triptych.compiler.stages import Captured, Source
from triptych.manifest import DynamicDim, TensorSignature

TORCH_NAMESPACES = {"aten", "prim", "prims", "higher_order"}


@torch.library.custom_op("triptych_tests::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    """An operator with a kernel and no body that tracing could enter."""
    return x * 2


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Gelus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh") + F.gelu(x - 1) + F.gelu(2 * x, approximate="tanh")


def one_method(module: nn.Module) -> Captured:
    port = TensorSignature("x", "float32", (1, DynamicDim("S", 1, CONTEXT), 4))
    entry = EntryPoint("only", frozenset({OTHER}), lambda owner, x: owner(x), (port,), (OutputPort("y"),))
    return Source(Model(module, (entry,), Metadata(64, 64, 1))).capture()


def overloads(program: Program) -> Counter[str]:
    return Counter(
        str(node.target)
        for method in program.methods.values()
        for node in method.exported.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


def namespaces(program: Program) -> set[str]:
    return {name.partition(".")[0] for name in overloads(program)}


@pytest.fixture(scope="module")
def fp32() -> Captured:
    return tiny.captured()


@pytest.fixture(scope="module")
def quantized() -> Captured:
    return tiny.captured(passes="quantize{recipe=8da4w},static-kv-cache,swap-sdpa")


# ------------------------------------------------------------------------------------------------ expand-tanh-gelu


def test_the_tanh_form_is_expanded_and_the_exact_form_stays() -> None:
    rewritten = one_method(Gelus()).rewrite("expand-tanh-gelu")
    assert [str(match) for match in rewritten.results[-1].matches] == ["only: gelu", "only: gelu_2"]
    found = overloads(rewritten.program)
    assert (found["aten.tanh.default"], found["aten.gelu.default"]) == (2, 1)
    (exact,) = [node for node in rewritten.program.methods["only"].exported.graph.nodes if "gelu" in str(node.target)]
    assert exact.kwargs.get("approximate", "none") == "none"


@pytest.mark.parametrize("length", [1, 33])
def test_the_expansion_computes_torchs_tanh_gelu(length: int) -> None:
    x = torch.linspace(-12, 12, 4 * length).reshape(1, length, 4)
    got = one_method(Gelus()).rewrite("expand-tanh-gelu").program.methods["only"].exported.module()(x)
    torch.testing.assert_close(got, Gelus()(x), rtol=1e-5, atol=1e-6)
    assert (F.gelu(x, approximate="tanh") - F.gelu(x)).abs().max() > 1e-5 or length == 1, "the two forms differ here"


def test_a_program_with_the_exact_form_alone_is_left_as_it_is() -> None:
    captured = one_method(nn.GELU())
    rewritten = captured.rewrite("expand-tanh-gelu")
    assert rewritten.program is captured.program
    assert not rewritten.results[-1].changed


# ------------------------------------------------------------------------------------------------ legalize-aten


@pytest.mark.parametrize("recipe", ["fp32", "quantized"])
def test_aten_leaves_torchs_own_operators_only(recipe: str, request: pytest.FixtureRequest) -> None:
    captured: Captured = request.getfixturevalue(recipe)
    assert namespaces(captured.program) - TORCH_NAMESPACES, "there was something to legalize"
    assert namespaces(captured.rewrite("legalize-aten").program) <= TORCH_NAMESPACES


def test_aten_says_how_often_it_matched(fp32: Captured) -> None:
    found = Counter(
        (match.method, match.where.rstrip("_0123456789")) for match in fp32.rewrite("legalize-aten").results[-1].matches
    )
    assert found == {
        (method, operator): count
        for method in ("prefill", "decode")
        for operator, count in (("update_cache", 4), ("cached_sdpa", 2))
    }


def test_aten_keeps_the_state_and_its_users(fp32: Captured) -> None:
    program = fp32.rewrite("legalize-aten").program
    for name, row in fp32.program.state.items():
        assert (program.state[name].readers, program.state[name].writers) == (row.readers, row.writers)


def test_aten_names_an_operator_without_a_body() -> None:
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.triptych_tests.opaque(x)

    rewritten = one_method(Opaque()).rewrite("legalize-aten")
    (refusal,) = rewritten.results[-1].refusals
    assert "triptych_tests.opaque" in str(refusal)
    assert refusal.line is not None
    assert refusal.line.startswith("test_legalize.py:")
    assert not rewritten.results[-1].changed


# ------------------------------------------------------------------------------------------------ legalize-executorch


@pytest.mark.parametrize("recipe", ["fp32", "quantized"])
def test_executorch_leaves_no_neutral_operator(recipe: str, request: pytest.FixtureRequest) -> None:
    captured: Captured = request.getfixturevalue(recipe)
    before, after = overloads(captured.program), overloads(captured.rewrite("legalize-executorch").program)
    assert "triptych" in namespaces(captured.program)
    assert not [name for name in after if name.startswith("triptych.")]
    assert after["llama.update_cache.default"] == before["triptych.update_cache.default"] == 8
    assert after["llama.custom_sdpa.default"] == before["triptych.cached_sdpa.default"] == 4


def test_executorch_reads_the_position_once_a_method_and_bounds_it(fp32: Captured) -> None:
    program = fp32.rewrite("legalize-executorch").program
    for name in ("prefill", "decode"):
        nodes = program.methods[name].exported.graph.nodes
        assert sum(node.target is torch.ops.aten.item.default for node in nodes) == 1
        (bound,) = [node for node in nodes if "sym_constrain_range" in str(node.target)]
        assert (bound.kwargs["min"], bound.kwargs["max"]) == (0, tiny.CONTEXT_LENGTH - 1)


def test_executorch_drops_the_padding_index_of_an_embedding() -> None:
    model = tiny.tiny(layers=1)
    padded = nn.Embedding(tiny.VOCABULARY, tiny.WIDTH, padding_idx=0)
    model.module.embedding = padded
    program = tiny.captured(model).rewrite("legalize-executorch").program
    calls = [
        node
        for node in program.methods["token_embedding"].exported.graph.nodes
        if node.target is torch.ops.aten.embedding.default
    ]
    assert [len(node.args) for node in calls] == [2]


def test_executorch_keeps_the_scale_of_an_attention() -> None:
    class Scaled(tiny.TinyAttention):
        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.split(x)
            return self.merge(F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.125))

    program = tiny.captured(tiny.tiny(Scaled())).rewrite("legalize-executorch").program
    (call,) = [node for node in program.methods["decode"].exported.graph.nodes if "custom_sdpa" in str(node.target)]
    assert 0.125 in (*call.args, *call.kwargs.values())


def test_legalizing_changes_nothing_of_methods_without_such_operators(fp32: Captured) -> None:
    program = fp32.rewrite("legalize-aten").program
    assert program.methods["token_embedding"] is fp32.program.methods["token_embedding"]
    assert program.metadata == replace(fp32.program.metadata)


# ------------------------------------------------------------------------------------------------ every operator


@pytest.mark.parametrize("target", ["aten", "executorch"])
@pytest.mark.parametrize("name", cases.CACHES)
def test_no_kind_of_cache_leaves_a_neutral_operator(name: str, target: str) -> None:
    captured = captured_calls(*cases.cached(cases.CACHES[name]))
    assert "triptych" in namespaces(captured.program)
    legal = captured.rewrite(f"legalize-{target}").program
    assert namespaces(legal) <= TORCH_NAMESPACES | ({"llama"} if target == "executorch" else set())
    assert overloads(legal)["llama.custom_sdpa.default"] == (target == "executorch")


def test_executorch_spells_out_what_its_kernel_cannot_do() -> None:
    """Of four attentions two have masks; one has a soft cap and one values wider than keys."""
    legal = captured_calls(*cases.masked()).rewrite("legalize-executorch").program
    found = overloads(legal)
    assert found["llama.custom_sdpa.default"] == 2
    assert (found["aten.tanh.default"], found["aten.scaled_dot_product_attention.default"]) == (1, 1)
    assert not [name for name in found if name.startswith("triptych.")]


def test_executorch_gives_its_kernel_the_mask_and_no_causality() -> None:
    legal = captured_calls(*cases.cached(cases.static(6))).rewrite("legalize-executorch").program
    (method,) = legal.methods.values()
    (call,) = [node for node in method.exported.graph.nodes if node.target is torch.ops.llama.custom_sdpa.default]
    start, mask, _, is_causal = call.args[3:7]
    assert (start, is_causal) == (0, False)
    assert isinstance(mask, torch.fx.Node)
    assert (mask.meta["val"].dtype, mask.meta["val"].dim()) == (torch.float32, 2)


def test_executorch_looks_up_tables_in_its_own_kernels() -> None:
    found = overloads(captured_calls(*cases.table()).rewrite("legalize-executorch").program)
    assert found["quantized_decomposed.embedding_byte.default"] == 1
    assert found["quantized_decomposed.embedding_4bit.default"] == 1


def test_a_rings_writes_stay_behind_its_attention_where_several_positions_come() -> None:
    """What the attention sees must be read before it is overwritten."""
    legal = captured_calls(*cases.cached(cases.ring())).rewrite("legalize-executorch").program
    (method,) = legal.methods.values()
    order = [str(node.target) for node in method.exported.graph.nodes]
    assert order.index("aten.copy_.default") > order.index("llama.custom_sdpa.default")
    assert "llama.update_cache.default" not in order
