"""Whether the CPU has bfloat16, and what a run says that would emulate it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from priorclip.common import cpu_features
from priorclip.training.engine.build import warn_of_emulation


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    cpu_features.has_bfloat16.cache_clear()
    yield
    cpu_features.has_bfloat16.cache_clear()


def test_this_cpu_is_judged_as_torch_judges_it() -> None:
    known = torch.cpu.get_capabilities()
    assert cpu_features.has_bfloat16() == any(
        known.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
    )


@pytest.mark.parametrize(
    ("flags", "precision", "warns"),
    [(["avx2"], "bf16", True), (["avx2"], "fp32", False), (["amx_bf16"], "bf16", False), (None, "bf16", True)],
)
def test_only_a_run_that_would_emulate_bfloat16_is_warned(
    flags: list[str] | None,
    precision: str,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cpu_features, "get_cpu_info", lambda: {} if flags is None else {"flags": flags})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="priorclip"):
        warn_of_emulation(precision)
    assert ("--run.engine.precision fp32" in caplog.text) == warns
