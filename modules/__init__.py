"""`triptych.modules`: exportable modules and neutral operators that passes swap in."""

if not __name__.startswith("triptych."):
    raise ImportError(
        f"import this package as 'triptych.modules', not as {__name__!r}: a second copy would register twice"
    )
