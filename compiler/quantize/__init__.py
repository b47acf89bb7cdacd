"""Quantization recipes: the only place that knows torchao."""
