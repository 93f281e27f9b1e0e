"""What is here, what runs, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

# Package on PyPI, module to look for, and what it is needed for.
OPTIONAL = (
    ("diffusers", "diffusers", "fm.capture, fm.match and the built-in model"),
    ("transformers", "transformers", "text encoders of Stable Diffusion models"),
    ("accelerate", "accelerate", "loading large models with little memory"),
    ("pillow", "PIL", "reading image files"),
    ("scikit-image", "skimage", "the photographs of flashmaps demo"),
    ("scikit-learn", "sklearn", "flashmaps eval, the demo, and training the built-in model"),
    ("scipy", "scipy", "flashmaps eval"),
    ("pyarrow", "pyarrow", "flashmaps eval, and Parquet files of many pairs"),
    ("ray", "ray", "flashmaps batch --engine ray"),
    ("faiss-cpu", "faiss", "flashmaps batch --pairs nearest --search tokens"),
    ("matplotlib", "matplotlib", "pictures"),
    ("jinja2", "jinja2", "the report of flashmaps demo"),
    ("typer", "typer", "the command line"),
    ("rich", "rich", "tables in the terminal"),
    ("fastapi", "fastapi", "flashmaps explore"),
    ("uvicorn", "uvicorn", "flashmaps explore"),
    ("anywidget", "anywidget", "fm.explore in a notebook"),
    ("psutil", "psutil", "flashmaps bench, and the memory shown here"),
    ("pytest-benchmark", "pytest_benchmark", "flashmaps bench"),
)


def examine() -> dict[str, Any]:
    """Everything the doctor knows, as plain Python values."""
    from flashmaps import __version__
    from flashmaps.maps.backends.choice import backends

    return {
        "versions": {
            "flashmaps": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in ("numpy", "diffusers", "transformers")},
        },
        "system": {
            "platform": platform.platform(),
            "processor": _processor(),
            "instruction sets of torch": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
            "memory": _memory(),
        },
        "gpu": _gpu(),
        "backends": {
            name: {"available": bool(state.available), "reason": state.reason}
            for name, state in backends().items()
        },
        "cpu kernel": _cpu_kernel(),
        "builtin model": _builtin(),
        "missing": [
            {"package": package, "for": purpose, "get": f"pip install {package}"}
            for package, module, purpose in OPTIONAL
            if find_spec(module) is None
        ],
    }


def require(*modules: str) -> None:
    """ImportError that says how to get the first of these optional modules that is not here."""
    for package, module, purpose in OPTIONAL:
        if module in modules and find_spec(module) is None:
            raise ImportError(
                f"{package} is not installed ({purpose}); install it with: pip install {package}"
            )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        import psutil
    except ImportError:
        return "unknown (pip install psutil)"
    memory = psutil.virtual_memory()
    return f"{memory.total / 1e9:.1f} GB, {memory.available / 1e9:.1f} GB free"


def _gpu() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 1e9:.0f} GB"
        )
    return found


def _cpu_kernel() -> str:
    from flashmaps.maps.backends import cpu

    reason = cpu.unavailable_reason()
    return f"{cpu.instruction_set()} build" if reason is None else "not built"


def _builtin() -> str:
    from flashmaps.models import builtin_folder

    folder = builtin_folder()
    if not (folder / "model_index.json").is_file():
        return (
            "missing: this install has no weights; reinstall flashmaps from a release or checkout"
        )
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"there, {size / 1e6:.1f} MB"
