"""`triptych.benchmarks`: the benchmark suite."""

if not __name__.startswith("triptych."):
    raise ImportError(
        f"import this package as 'triptych.benchmarks', not as {__name__!r}: a second copy would register twice"
    )
