"""From logits to the next token; needs torch only."""

from triptych.runtime.sampling.filters import check_settings, keep_top_k, keep_top_p, scale_temperature
from triptych.runtime.sampling.sampler import Sampler

__all__ = ["Sampler", "check_settings", "keep_top_k", "keep_top_p", "scale_temperature"]
