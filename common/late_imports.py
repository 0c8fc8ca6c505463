"""Imports timm and transformers without torch's compiler, which takes a third of the start of a process.

    with late_imports():
        import timm                      # marks functions for the compiler, but compiles none
    torch.compile(model)                 # imports the compiler now

Some libraries import ``torch._dynamo`` (with sympy, triton and FSDP, 2.5 s of processor time) or ``scipy.optimize``
only to name a function that few programs call. Within ``late_imports`` they get a stand-in, whose functions import the
real module when they are called. A name that the stand-in does not have imports the real module at once, so another
version of a library costs time and changes nothing else. The stand-ins are gone after the block.

A process that has the real module already keeps it.

    late_within("deepspeed.autotuning.autotuner", "mlflow")

DeepSpeed imports mlflow (2.2 s) wherever it is installed, for its tuner, which no training here calls. The line above
gives the tuner's module a stand-in of mlflow whenever that module is imported, and nobody else.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"


def same(function: Any) -> Any:
    """A mark for the compiler, which transformers sets on kernels of sparse and fp8 layers. No encoder has them."""
    return function


def disable(function: Any = None, recursive: bool = True, **_: Any) -> Any:
    """``torch.compiler.disable`` as torch itself uses it: it asks the compiler at the first call of the function."""
    import torch

    return torch._disable_dynamo(function, recursive)


def called_later(module: str, name: str) -> Callable[..., Any]:
    """Returns a function that imports ``module`` when it is called, and calls its function ``name``."""
    return lambda *words, **options: getattr(importlib.import_module(module), name)(*words, **options)


def only_calls(module: str, *names: str) -> dict[str, Callable[..., Any]]:
    return {name: called_later(module, name) for name in names}


MASKING = f"{COMPILER}._trace_wrapped_higher_order_op"
STAND_INS: Mapping[str, Mapping[str, Any]] = {
    COMPILER: {"disable": disable, "assume_constant_result": same, "allow_in_graph": same},
    f"{COMPILER}.utils": only_calls(f"{COMPILER}.utils", "is_compile_supported"),  # torchvision
    MASKING: only_calls(MASKING, "TransformGetItemToIndex"),  # transformers
    "scipy.optimize": only_calls("scipy.optimize", "linear_sum_assignment"),  # transformers
}


class StandIn(ModuleType):
    """A module with some functions of the real one. Another name imports the real one."""

    def __init__(self, name: str, functions: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        remove_stand_ins()
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class RealModules:
    """Finds sub-modules of a module that has a stand-in: it removes the stand-ins and imports the real ones."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        del path, target
        if not isinstance(sys.modules.get(name.rpartition(".")[0]), StandIn):
            return None
        remove_stand_ins()
        importlib.import_module(name)
        return ModuleSpec(name, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = sys.modules[spec.name]
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


FINDER: Any = RealModules()


def remove_stand_ins() -> None:
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]
    if FINDER in sys.meta_path:
        sys.meta_path.remove(FINDER)


@contextmanager
def late_imports() -> Iterator[None]:
    """Within it, modules of STAND_INS that are not imported yet have stand-ins. Use it at the top of a module."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)
        for name, functions in STAND_INS.items():
            parent = name.rpartition(".")[0]
            if name not in sys.modules and not (parent in STAND_INS and not isinstance(sys.modules[parent], StandIn)):
                sys.modules[name] = StandIn(name, functions)
    try:
        yield
    finally:
        remove_stand_ins()


class LateWithin(Loader):
    """Finds and runs ``module`` as python does, but ``late`` is a stand-in while the code of the module runs."""

    def __init__(self, module: str, late: str) -> None:
        self.module, self.late = module, late

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> Any:
        del path, target
        if name != self.module:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        # An installed module only: whoever asks whether it is there must get the true answer.
        if spec is not None and self.late not in sys.modules and importlib.util.find_spec(self.late):
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec) if self.loader else None

    def exec_module(self, module: ModuleType) -> None:
        assert self.loader is not None
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        stand_in = StandIn(self.late, {"__spec__": importlib.util.find_spec(self.late)})
        sys.modules[self.late] = stand_in
        try:
            self.loader.exec_module(module)
        finally:
            if sys.modules.get(self.late) is stand_in:
                del sys.modules[self.late]


def late_within(module: str, late: str) -> None:
    """From now on, importing ``module`` does not import ``late``, which comes when one of its names is asked for."""
    if module not in sys.modules:
        sys.meta_path.insert(0, LateWithin(module, late))  # type: ignore[arg-type]
