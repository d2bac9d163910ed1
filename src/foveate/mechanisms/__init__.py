"""Every published system: one file each, in a package per family, found by itself.

A new system is one new file in `baseline/`, `local/`, `routed/`, `linear/`, `scored/` or `gated/`;
importing this package imports every such file, and with it the facts its `@system` decorator records.
"""

from importlib import import_module
from pkgutil import iter_modules

for _family in iter_modules(__path__, __name__ + "."):
    if _family.ispkg:
        _package = import_module(_family.name)
        for _file in iter_modules(_package.__path__, _family.name + "."):
            import_module(_file.name)
