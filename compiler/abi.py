"""The contract of ExecuTorch's own language-model runners, as far as a program has to keep it.

Their C++ is in ``extension/llm/runner`` of ExecuTorch; the names below are those of its ``constants.h``. A ``.pte``
that keeps the contract runs unchanged in the runners that ExecuTorch's iOS, Android and Python packages hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from triptych.compiler.program import Program
from triptych.manifest import EXECUTORCH_LLM_ABI, DynamicDim

FORWARD: Final = "forward"
TOKEN_EMBEDDING_METHOD: Final = "token_embedding"
TEXT_DECODER: Final = "text_decoder"
VISION_ENCODER: Final = "vision_encoder"


def constant_methods(program: Program) -> Mapping[str, int | bool | list[int]]:
    """Return what a ``.pte`` tells its runner beside its methods, by method name; nothing for the ABI `triptych`.

    A prompt is prefilled in calls of at most ``get_max_seq_len`` tokens, and one token a call unless
    ``enable_dynamic_shape``. ``get_eos_ids`` replaces the end-of-text token of the tokenizer. The runners of ExecuTorch
    1.4 read neither ``get_bos_id`` nor ``get_vocab_size``; older ones do.
    """
    metadata = program.metadata
    if metadata.abi != EXECUTORCH_LLM_ABI:
        return {}
    ((_, decoder),) = program.methods_with("prefill")
    longest = decoder.inputs[0].shape[1]
    targets = {str(node.target) for node in decoder.exported.graph.nodes}
    constants: dict[str, int | bool | list[int]] = {
        "get_max_seq_len": longest.maximum if isinstance(longest, DynamicDim) else longest,
        "get_max_context_len": metadata.max_context,
        "get_vocab_size": metadata.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": isinstance(longest, DynamicDim),
        "use_sdpa_with_kv_cache": "llama.custom_sdpa.default" in targets,
    }
    if metadata.bos_id is not None:
        constants["get_bos_id"] = metadata.bos_id
    if metadata.eos_ids:
        constants["get_eos_ids"] = list(metadata.eos_ids)
    return constants
