"""Compiles the model of a run by torch.compile: ``run.engine.compile``.

    compilations = compile_engine(engine, "default")
    compilations.report()              # {"compile": {"graphs": 3, "recompilations": 0, "seconds": 84.1}}

The model is compiled at its first forward pass, and again for each kind of input: training, and in an evaluation images
alone and texts alone. Each of these is logged with its time. A compilation of code that was compiled before is a
recompilation; torch names its reason in the log.

A compiled model computes what the other one does, up to rounding, because kernels are fused and sums have another
order. Dropout draws other numbers. So a resumed run equals the uninterrupted one only if both are compiled.
"""

from __future__ import annotations

import os
import shutil
import time
from typing import Any

import deepspeed
import torch

from priorclip.common.output import get_logger

logger = get_logger(__name__)

LIMIT = 16  # compilations of one function; torch's 8 is reached by evaluations, and then it stops compiling


class Compilations:
    """Counts the compilations of this process and logs each.

    Attributes:
        graphs: compilations of new code
        recompilations: compilations of code that was compiled before, for other inputs
        seconds: time of all of them; the backward pass is compiled within the first backward pass and not counted
    """

    def __init__(self) -> None:
        from torch._dynamo.callback import on_compile_end, on_compile_start

        self.graphs, self.recompilations, self.seconds = 0, 0, 0.0
        self._begun = 0.0
        on_compile_start(self._begin)
        on_compile_end(self._end)

    def _begin(self, _: Any) -> None:
        self._begun = time.monotonic()

    def _end(self, facts: Any) -> None:
        if facts.callback_trigger.name != "DYNAMO":
            return
        seconds = time.monotonic() - self._begun
        self.seconds += seconds
        code, _, number = facts.compile_id.partition("/")
        if number == "0":
            self.graphs += 1
            logger.info("torch compiled piece %s of the model in %.0f s", code, seconds)
        else:
            self.recompilations += 1
            logger.info(
                "torch compiled piece %s of the model again, in %.0f s, for inputs of another kind (%d recompilations)",
                code, seconds, self.recompilations,
            )  # fmt: skip

    def report(self) -> dict[str, Any]:
        """Returns the counts for ``report.json``."""
        counts = {"graphs": self.graphs, "recompilations": self.recompilations, "seconds": round(self.seconds, 1)}
        return {"compile": counts}


def compile_engine(engine: deepspeed.DeepSpeedEngine, mode: str) -> Compilations | None:
    """Lets torch compile the engine's model at its first call. Names of parameters stay.

    Args:
        engine: under any ZeRO stage; stage 3 gathers weights between pieces of the model, so it compiles more pieces
        mode: off, default, or max-autotune, which tries several kernels of each product and takes minutes

    Returns:
        The counts, or None if it is off.

    Raises:
        ValueError: this machine has no compiler
    """
    if mode == "off":
        return None
    refuse_without_compiler()
    import torch._dynamo
    import torch._logging

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, LIMIT)
    if engine.global_rank == 0:
        torch._logging.set_logs(recompiles=True)
    engine.compile(compile_kwargs={"mode": mode, "dynamic": False})
    return Compilations()


def refuse_without_compiler() -> None:
    """Raises ValueError if torch.compile has no compiler for this device, before it fails inside a step."""
    if torch.cuda.is_available():
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError("run.engine.compile needs triton for this GPU: pip install triton, or set it to off")
        return
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"run.engine.compile needs the C++ compiler {compiler} on a CPU: install g++, or set it to off"
        )
