"""What a first import brings along: the light parts stay light, so that the command line answers at once.

The import contracts see every import, late ones too; only a fresh interpreter shows what is really loaded.
"""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "executorch", "torchao", "numpy", "networkx")


@pytest.mark.parametrize(
    "module",
    [
        "triptych",
        "triptych.errors",
        "triptych.manifest",
        "triptych.cli",
        "triptych.runtime",
        "triptych.runtime.tokenizers",
    ],
)
def test_import_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nsys.argv = ['triptych', '--help']\nfrom triptych.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\nassert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
