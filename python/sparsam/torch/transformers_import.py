"""Registers packed weights with Hugging Face transformers, without importing transformers for others."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__all__ = ["register", "register_when_imported"]

_MODELS = "transformers.modeling_utils"  # without which transformers loads no model


class _WaitForModels(MetaPathFinder):
    """Registers packed weights at the end of the import of transformers' models, and finds nothing itself."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        del path, target
        if fullname != _MODELS:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def register_when_imported() -> None:
    """Registers packed weights with transformers: now, or as soon as that is imported."""
    if _MODELS in sys.modules:
        register()
    elif not any(isinstance(finder, _WaitForModels) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitForModels())


def register() -> None:
    """Registers packed weights with transformers, if it was imported before and is recent enough."""
    version = getattr(sys.modules.get("transformers"), "__version__", "0")
    if int(version.split(".")[0]) >= 5:
        from sparsam.torch import huggingface, transformers_attention  # noqa: F401, PLC0415 - takes seconds
