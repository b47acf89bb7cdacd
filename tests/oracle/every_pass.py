"""Every built-in pass in a pipeline of its own, on the default model and on a decoder, and all of them in one."""

from typing import Final

CACHED: Final = "static-kv-cache,swap-sdpa"

# Before capture: the pipeline up to the pass.
SOURCE: Final = {
    "static-kv-cache": "static-kv-cache",
    "swap-sdpa": CACHED,
    "quantized-kv-cache": "static-kv-cache,quantized-kv-cache",
}

# After capture of a model with a cache: the pipeline up to the pass.
PROGRAM: Final = {
    "adopt-abi": "last-token-logits,adopt-abi{abi=executorch-llm}",
    "deduplicate-weights": "precompute-rope,deduplicate-weights",
    "expand-norms": "remove-no-op-casts,fold-rms-norm,expand-norms",
    "expand-splits": "expand-splits",
    "expand-tanh-gelu": "expand-tanh-gelu",
    "fold-constants": "fold-constants",
    "fold-rms-norm": "remove-no-op-casts,fold-rms-norm",
    "fuse-gate-up": "fuse-gate-up",
    "fuse-qkv": "fuse-qkv",
    "greedy-token": "last-token-logits,greedy-token",
    "infer-view-sizes": "infer-view-sizes",
    "last-token-logits": "last-token-logits",
    "legalize-aten": "legalize-aten",
    "legalize-executorch": "legalize-executorch",
    "mean-as-linear": "expand-norms,mean-as-linear",
    "precompute-rope": "precompute-rope",
    "prune-vocabulary": "last-token-logits,prune-vocabulary{top=300}",
    "quantize-embedding": "quantize-embedding{untie=true}",
    "remove-dead-code": "remove-dead-code",
    "remove-dead-methods": "remove-dead-methods{keep=decode}",
    "remove-no-op-casts": "remove-no-op-casts",
    "remove-redundant-permutes": "remove-redundant-permutes",
    "split-prefill-first-chunk": "last-token-logits,split-prefill-first-chunk",
}

# Passes for another kind of model, or judged in another way; each has its own file of tests.
ELSEWHERE: Final = {
    "assert-cost": "changes nothing",
    "cond-attention": "wants cross-attention",
    "merge-lora": "wants adapters",
    "merge-token-embedding": "wants a model without images",
    "quantize": "moves the reference: see test_right_passes",
    "ring-kv-cache": "wants sliding windows",
    "sink-kv-cache": "changes what the model computes once its window is full",
}

FULL: Final = (
    "fold-constants,precompute-rope,fuse-qkv,fuse-gate-up,remove-redundant-permutes,fold-rms-norm,last-token-logits,"
    "deduplicate-weights,split-prefill-first-chunk,remove-dead-code"
)
"""What an export of a decoder may want all at once, in an order that holds for every model."""
