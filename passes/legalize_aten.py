"""``legalize-aten``: operators of other libraries become the aten they consist of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch._C import DispatchKey

from triptych.compiler.custom_operators import TORCH_NAMESPACES
from triptych.compiler.editing import GraphEditor
from triptych.compiler.pass_kinds import GraphPass, MatchLog
from triptych.compiler.program import Method
from triptych.modules.operators import REFERENCE_KERNELS


@dataclass(frozen=True)
class LegalizeAten(GraphPass):
    """Leave nothing in the graph but torch's own operators, so that whoever runs it needs only torch.

    1. The reference kernel of each ``triptych::`` operator is inlined.
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
                editor.inline(node, REFERENCE_KERNELS[target] if is_neutral else target, decompose=not is_neutral)
