"""The tested pieces behind the course: import this at work the next day.

`import helpers` is instant. A module loads when you first touch it (`helpers.lora`), and
torch and friends load when a function needs them.
"""

import importlib
import pkgutil
from types import ModuleType

__all__ = sorted(
    module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")
)


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return importlib.import_module(f"helpers.{name}")
    raise AttributeError(f"module 'helpers' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
