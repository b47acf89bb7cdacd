"""`triptych.passes`: one rewrite a file, found by its file name."""

if not __name__.startswith("triptych."):
    raise ImportError(
        f"import this package as 'triptych.passes', not as {__name__!r}: a second copy would register twice"
    )
