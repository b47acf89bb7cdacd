"""torchtune 0.6.1, importable beside torchao 0.18 and without the data libraries that it wants.

torchtune's own requirements would install a hundred megabytes that no model needs (datasets, pyarrow, torchdata), and
its package imports all of them. So the tests fetch its wheel as they fetch checkpoints, and import from it the modules
that models consist of: the packages on the way are entered without running what stands in them.
"""

import importlib
import sys
import types
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Final

from tests import assets

TORCHTUNE: Final = assets.WheelAsset(
    package="torchtune",
    version="0.6.1",
    wheel="torchtune-0.6.1-py3-none-any.whl",
    sha256="bcbc4ee9774b5c5829a5ff13df851e0b0e32416c018af8db53faa3472ac256e7",
    member="torchtune/",
)
ENTERED: Final = (
    "torchtune",
    "torchtune.models",
    "torchtune.models.clip",
    "torchtune.models.llama3",
    "torchtune.models.llama3_1",
    "torchtune.models.llama3_2_vision",
)
NF4: Final = "torchao.dtypes.nf4tensor"
NF4_NOW: Final = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


def torchtune(name: str) -> Any:
    """Import a module of torchtune, such as "modules"; skips where the registry is out of reach."""
    if "torchtune" not in sys.modules:
        folder = assets._available(_unpacked)
        sys.modules.setdefault(NF4, importlib.import_module(NF4_NOW))
        for package in ENTERED:
            _enter(package, folder)
    return importlib.import_module(f"torchtune.{name}")


def _unpacked() -> Path:
    cache = assets.asset_cache()

    def unpack(folder: Path) -> None:
        with zipfile.ZipFile(assets.fetch_wheel(TORCHTUNE, cache)) as wheel:
            wheel.extractall(folder)

    return assets._made_once(cache / f"torchtune-{TORCHTUNE.version}", unpack)


def _enter(package: str, folder: Path) -> None:
    """Register a package whose modules can be imported, without running its own ``__init__``."""
    module = types.ModuleType(package)
    module.__path__ = [str(folder.joinpath(*package.split(".")))]
    module.__spec__ = ModuleSpec(package, None, is_package=True)
    sys.modules[package] = module
