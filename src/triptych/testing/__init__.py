"""Helpers for authors of passes: check a pass against its promises, and measure what a set of traces can see.

`check_pass` runs one pass on a model and holds it to what its author says of it; `default_model` is the embedded
vision-language model to try it on. `triptych.testing.mutation` makes wrong variants of a program.
"""

from triptych.testing.checks import PassCheck, check_pass, default_model, default_oracle

__all__ = ["PassCheck", "check_pass", "default_model", "default_oracle"]
