"""Sending a module's attention call elsewhere: the call alone, this module alone, and copies with it."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler import tiny
from triptych.modules.attention import CachedAttention
from triptych.modules.kv_cache import StaticKVCache
from triptych.modules.position import current_start_pos, sequence_position
from triptych.modules.routing import HANDLER_NAME, route_attention, routed_handler


class Recorder(nn.Module):
    """Counts its calls and answers with the mean of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        self.count += 1
        return value.mean(dim=-2, keepdim=True).expand_as(query)


def calls(owner: nn.Module) -> int:
    handler = routed_handler(owner)
    assert isinstance(handler, Recorder)
    return int(handler.count)


def test_the_call_goes_to_the_handler() -> None:
    owner = tiny.TinyAttention()
    x = torch.randn(1, 5, tiny.WIDTH)
    before = owner(x)
    route_attention(owner, Recorder())
    assert not torch.allclose(owner(x), before)
    assert calls(owner) == 1


def test_the_handlers_buffers_are_state_of_the_owner() -> None:
    owner = tiny.TinyAttention()
    route_attention(owner, Recorder())
    assert f"{HANDLER_NAME}.count" in dict(owner.named_buffers())


def test_other_modules_keep_their_attention() -> None:
    routed, plain = tiny.TinyAttention(), tiny.TinyAttention()
    x = torch.randn(1, 5, tiny.WIDTH)
    before = plain(x)
    route_attention(routed, Recorder())
    routed(x)
    torch.testing.assert_close(plain(x), before, rtol=0, atol=0)


def test_other_functions_of_the_owner_are_left_alone() -> None:
    class Softmax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(x, dim=-1)

    owner = Softmax()
    route_attention(owner, Recorder())
    x = torch.randn(2, 3)
    torch.testing.assert_close(owner(x), torch.softmax(x, -1), rtol=0, atol=0)
    assert calls(owner) == 0


def test_a_deep_copy_routes_to_its_own_handler() -> None:
    model = tiny.TinyModel(tiny.TinyBlock(tiny.TinyAttention()))
    owner = model.get_submodule("blocks.0.attention")
    route_attention(owner, Recorder())
    copied = copy.deepcopy(model)
    copied(torch.zeros(1, 3, dtype=torch.int64))
    assert calls(copied.get_submodule("blocks.0.attention")) == 1
    assert calls(owner) == 0


def test_a_deep_copy_uses_its_own_weights() -> None:
    owner = tiny.TinyAttention()
    route_attention(owner, Recorder())
    copied = copy.deepcopy(owner)
    x = torch.randn(1, 5, tiny.WIDTH)
    before = copied(x)
    with torch.no_grad():
        owner.out.weight.zero_()
    torch.testing.assert_close(copied(x), before, rtol=0, atol=0)


def test_a_module_is_routed_once() -> None:
    owner = tiny.TinyAttention()
    route_attention(owner, Recorder())
    with pytest.raises(ValueError, match="already has a replaced forward"):
        route_attention(owner, Recorder())


def test_a_module_without_a_route_has_no_handler() -> None:
    assert routed_handler(tiny.TinyAttention()) is None


def test_the_attention_inside_torchs_own_multihead_attention_is_routed() -> None:
    owner = nn.MultiheadAttention(16, 2, batch_first=True, bias=False)
    x = torch.randn(1, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    route_attention(owner, Recorder())
    owner(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    assert calls(owner) == 1


# ------------------------------------------------------------------------------------------------ the cached form


def test_cached_attention_over_pieces_equals_the_plain_call_over_the_whole() -> None:
    query, key, value = (torch.randn(1, 4, 9, 8) for _ in range(3))
    wanted = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    attention = CachedAttention(StaticKVCache(12, 4, 8, 8, torch.float32))
    pieces = []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        with sequence_position(torch.tensor([start])):
            pieces.append(
                attention(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], is_causal=True)
            )
    torch.testing.assert_close(torch.cat(pieces, dim=2), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"attn_mask": torch.zeros(1, 1)}, {"dropout_p": 0.1}], ids=["mask", "dropout"])
def test_cached_attention_refuses_what_it_cannot_do(options: dict[str, Any]) -> None:
    attention = CachedAttention(StaticKVCache(12, 1, 4, 4, torch.float32))
    x = torch.randn(1, 1, 1, 4)
    with sequence_position(torch.tensor([0])), pytest.raises(ValueError, match="no attn_mask, no dropout"):
        attention(x, x, x, **options)


def test_a_mask_that_was_read_is_dropped() -> None:
    attention = CachedAttention(StaticKVCache(12, 1, 4, 4, torch.float32), drops_mask=True)
    x = torch.randn(1, 1, 3, 4)
    with sequence_position(torch.tensor([0])):
        masked = attention(x, x, x, attn_mask=torch.full((3, 3), float("-inf")).triu(1))
    torch.testing.assert_close(masked, F.scaled_dot_product_attention(x, x, x, is_causal=True))


def test_a_cache_outside_an_entry_point_says_what_is_missing() -> None:
    attention = CachedAttention(StaticKVCache(12, 1, 4, 4, torch.float32))
    x = torch.randn(1, 1, 1, 4)
    with pytest.raises(RuntimeError, match="'start_pos'"):
        attention(x, x, x)


def test_the_position_is_known_inside_only_and_nests() -> None:
    outer, inner = torch.tensor([3]), torch.tensor([5])
    with sequence_position(outer):
        with sequence_position(inner):
            assert current_start_pos() is inner
        assert current_start_pos() is outer
    with pytest.raises(RuntimeError):
        current_start_pos()
