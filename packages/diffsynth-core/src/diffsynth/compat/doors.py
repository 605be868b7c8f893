"""Door modules: module names that scripts for DiffSynth-Studio import. No torch.

    __getattr__ = door(__name__, {"ModelConfig": "diffsynth:ModelConfig"}, {"BasePipeline": use("diffsynth.Pipeline")})

A door of a package that has modules of its own lies in `compat/modules/<package>`, a folder that `with_doors` adds to
the package's path.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

QUANTIZATION = (
    "AutoWrappedQuantizedModule",
    "BackendConfig",
    "QUANT_BACKENDS",
    "QUANT_METHODS",
    "QuantBackend",
    "QuantMethodSpec",
    "check_backend_contract",
    "check_differentiable",
    "describe_quant_method",
    "register_quant_backend",
    "register_quant_method",
)
"""Names of the quantization interface that this version does not have."""


def later(feature: str) -> str:
    """Return the end of an error message for a name that comes with `feature`: `"yet: it comes with quantization, in a
    later version"`.
    """
    return f"yet: it comes with {feature}, in a later version"


def use(replacement: str) -> str:
    """Return the end of an error message for a name that `replacement` replaces: `"here: use diffsynth.Pipeline"`."""
    return f"here: use {replacement}"


def door(
    module: str, found: Mapping[str, str] | None = None, absent: Mapping[str, str] | None = None
) -> Callable[[str], Any]:
    """Return the `__getattr__` function, name -> object, of a door module (a module under a name that older scripts
    import): it imports names in `found`; those in `absent` raise ImportError, others AttributeError.

    A name that is absent raises ImportError, not AttributeError: the text of an AttributeError is lost in
    `from module import name`.

    Args:
        module: the door's `__name__`.
        found: name -> reference of the object, `"package.module:name"`, resolved at every access.
        absent: name -> text of `later` or `use`.
    """
    found, absent = found or {}, absent or {}

    def attribute(name: str) -> Any:
        if name in found:
            home, _, own = found[name].partition(":")
            return getattr(importlib.import_module(home), own)
        if name in absent:
            raise ImportError(f"{module} has no {name!r} {absent[name]}", name=module)
        if name == "__all__" and absent:
            # `import *` asks for this first; without an error the script would fail later, at an unknown name.
            texts = "; ".join(f"no {each!r} {text}" for each, text in absent.items())
            raise ImportError(f"cannot import * from {module}. It has {texts}", name=module)
        if name == "__all__" and found:
            return sorted(found)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return attribute


def with_doors(path: Iterable[str], package: str) -> list[str]:
    """Return the `__path__` of `package`, a list of folder names: those of `path`, then the folder of its door modules.

    Args:
        path: the package's own `__path__`; its modules come first.
        package: dotted name inside `diffsynth`, "utils.data".
    """
    return [*path, str(Path(__file__).parent / "modules" / Path(*package.split(".")))]
