"""Key-value caches as modules with registered buffers, so that export sees them as state.

A cache writes the fresh keys and values of a call and attends over what it then holds, by the kernels it is handed:
`StaticKVCache` has a slot for every position, `RingKVCache` for the last ones and, as an attention sink, the first;
`QuantizedKVCache` and `QuantizedRingKVCache` are their int8 forms.
"""

from triptych.modules.kv_cache.base import Kernels, KVCache
from triptych.modules.kv_cache.quantized import QuantizedKVCache, QuantizedRingKVCache
from triptych.modules.kv_cache.ring import RingKVCache
from triptych.modules.kv_cache.static import StaticKVCache

__all__ = ["KVCache", "Kernels", "QuantizedKVCache", "QuantizedRingKVCache", "RingKVCache", "StaticKVCache"]
