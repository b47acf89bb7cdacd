"""``legalize-aten``: operators of other libraries become the aten they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey
from torch.fx import Node

from triptych.compiler.custom_operators import TORCH_NAMESPACES
from triptych.compiler.editing import GraphEditor
from triptych.compiler.first_position import is_first_position
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.modules.operators import REFERENCE_KERNELS


@dataclass(frozen=True)
class LegalizeAten(GraphPass):
    """Leave nothing in the graph but torch's own operators, so that whoever runs it needs only torch.

    1. The reference kernel of each ``triptych::`` operator is inlined. Attention over no more than fresh keys from
       position 0 on needs no mask: it becomes ``scaled_dot_product_attention`` with ``is_causal``.
    2. So is the body of every other composite operator that is not torch's (torchao's quantization arithmetic).
    3. An operator without a body that can be traced is refused by name.
    """

    name: ClassVar[str] = "legalize-aten"
    may_match_nothing: ClassVar[bool] = True

    def rewrite(self, editor: GraphEditor, method: Method, log: MatchLog) -> None:
        """Replace every foreign operator call."""
        for node in list(editor.graph.nodes):
            target = node.target
            if not isinstance(target, torch._ops.OpOverload) or target.namespace in TORCH_NAMESPACES:
                continue
            is_neutral = target in REFERENCE_KERNELS
            if not is_neutral and not target.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
                log.refused(node, f"{target} has no composite kernel whose body could be inlined")
            elif log.match(node):
                body = REFERENCE_KERNELS[target] if is_neutral else target
                if target is torch.ops.triptych.cached_sdpa.default and _is_plainly_causal(node):
                    body = _causal_sdpa
                editor.inline(node, body, decompose=not is_neutral)


def _is_plainly_causal(node: Node) -> bool:
    query, keys, _, start_pos, *_ = node.args
    assert isinstance(query, Node)
    assert isinstance(keys, Node)
    is_masked = any(node.kwargs.get(name) is not None for name in ("attn_mask", "window", "softcap"))
    lengths = [str(used.meta["val"].shape[1]) for used in (query, keys)]
    return is_first_position(start_pos) and not is_masked and lengths[0] == lengths[1]


def _causal_sdpa(query: Tensor, key: Tensor, value: Tensor, _: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention within S positions; [B, S, H, D] of all three, where the keys may have fewer heads."""
    attended = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return attended.transpose(1, 2)
