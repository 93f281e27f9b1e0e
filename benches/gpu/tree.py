"""Lets this checkout be imported on a machine where nothing of it is installed.

`use()` puts python/, benches/ and tests/ on the path, and finds what does not lie there: kernels/,
and compiled modules that were carried along in build/carried/ (see carried.py).
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import sysconfig
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build/carried"
FOLDERS = (ROOT / "python", ROOT / "benches", ROOT / "benches/gpu", ROOT / "tests")


def carried(name: str) -> Path | None:
    """A compiled module that was carried along for this Python, if there is one."""
    file = CARRIED / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    return file if file.exists() else None


class _Tree(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "flashmaps.kernels":
            return importlib.util.spec_from_file_location(
                name,
                ROOT / "kernels/__init__.py",
                submodule_search_locations=[str(ROOT / "kernels")],
            )
        if name in ("flashmaps._C", "flashmaps._cuda"):
            file = carried(name.removeprefix("flashmaps."))
            if file is not None:
                return importlib.util.spec_from_file_location(name, file)
        return None


def use() -> None:
    """Make `import flashmaps` and the benchmarks' own modules work, once."""
    if not any(isinstance(finder, _Tree) for finder in sys.meta_path):
        sys.meta_path.append(_Tree())  # behind what is installed
        sys.path[:0] = [str(folder) for folder in FOLDERS if str(folder) not in sys.path]
