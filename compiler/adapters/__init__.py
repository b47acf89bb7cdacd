"""Describing models as entry points: the only place that knows model libraries."""
