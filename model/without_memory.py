"""Builds a model for its shapes and names only: on the meta device, without memory and without drawing weights.

    with without_memory():
        model = build_model(config)

On the meta device the draws of the initial weights compute nothing, but torch still works out the types of each, for
which it imports its compiler (2.5 s). So they are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# In-place functions by which timm and transformers set weights, besides those of torch.nn.init. They change only
# values, and a meta tensor has none.
DRAWS = frozenset(("uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_", "copy_"))


class SkipDraws(TorchFunctionMode):
    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        options = options or {}
        if getattr(function, "__name__", "") in DRAWS or getattr(function, "__module__", "") == "torch.nn.init":
            tensor = arguments[0] if arguments else options.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return function(*arguments, **options)


@contextmanager
def without_memory() -> Iterator[None]:
    with torch.device("meta"), SkipDraws():
        yield
