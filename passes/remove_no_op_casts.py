"""``remove-no-op-casts``: casts to the dtype a value already has go away."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from triptych.compiler.rewrite_rule import RewriteRule, RuleMatch


@dataclass(frozen=True)
class RemoveNoOpCasts(RewriteRule):
    """Replace ``x.to(dtype)`` by ``x`` where x has that dtype."""

    name: ClassVar[str] = "remove-no-op-casts"

    def pattern(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.ops.aten.to.dtype(x, dtype)

    def check(self, match: RuleMatch) -> str | None:
        found, wanted = match.value("x").dtype, match["dtype"]
        return None if found == wanted else f"it changes {found} to {wanted}"

    def replacement(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x
