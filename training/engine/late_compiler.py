"""Trains without torch's compiler, which a run that compiles nothing does not need.

    compile_muon_late()                      # before deepspeed.initialize
    optimizer = make_optimizer(torch.optim.AdamW, parameters, lr=1e-4)

DeepSpeed imports its Muon optimizer for a type check, and that module compiles three functions where it is imported.
torch's optimizers import the compiler in their first step, so that it does not look into them. Each takes 2.5 seconds
of processor time a rank.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from deepspeed.runtime import compiler
from torch.optim import Optimizer

MUON = "deepspeed.runtime.zero.muon.original_muon"
# torch imports the compiler when one of these is called first, to mark it.
MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def compile_muon_late() -> None:
    """Muon's functions are compiled at their first call. In a version without that module this does nothing."""
    compile_now = getattr(compiler, "compile", None)
    if compile_now is None or MUON in sys.modules:
        return
    compiler.compile = lambda: compiled_at_first_call(compile_now())
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module(MUON)
    finally:
        compiler.compile = compile_now


def compiled_at_first_call(compile_it: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``compile_it`` (``torch.compile``) as a decorator that compiles a function when it is first called."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.cache
        def compiled() -> Callable[..., Any]:
            return compile_it(function)

        @functools.wraps(function)
        def call(*words: Any, **options: Any) -> Any:
            return compiled()(*words, **options)

        return call

    return decorate


def make_optimizer(kind: type[Optimizer], *words: Any, **options: Any) -> Optimizer:
    """Returns an optimizer of torch whose steps do not import the compiler. They must not be compiled.

    A version of torch that marks its methods otherwise imports the compiler, which costs time only.
    """
    for name in MARKED:
        method = inspect.unwrap(getattr(Optimizer, name))
        if method is not getattr(Optimizer, name) and "torch._dynamo" not in sys.modules:
            method.__dynamo_disable = method  # what the mark would find: the method itself
    optimizer = kind(*words, **options)
    if not optimizer.defaults.get("differentiable"):
        step = Optimizer.profile_hook_step(torch.no_grad()(inspect.unwrap(kind.step)))
        optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]
    return optimizer
