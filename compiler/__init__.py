"""`triptych.compiler`: the IR, capture, the pass manager and the targets."""

if not __name__.startswith("triptych."):
    raise ImportError(
        f"import this package as 'triptych.compiler', not as {__name__!r}: a second copy would register twice"
    )
