"""timm and transformers are imported without torch's compiler, which still works when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMPILER = ("torch._dynamo", "torch._inductor", "scipy.optimize")

# The stand-ins' functions are compared with the real ones after the real modules were imported.
WHOLE = f"""
import sys
import priorclip.finetune.train_prior
import priorclip.pretrain.train_retrieval
import priorclip.retrieval.encoder
assert not [name for name in {COMPILER} if name in sys.modules], "imported"

import numpy, torch
import torchvision
import transformers.masking_utils as masking
import transformers.loss.loss_for_object_detection as detection
from timm.models.naflexvit import NaFlexRopeIterator

assert detection.linear_sum_assignment(numpy.array([[3.0, 1.0], [1.0, 3.0]]))[1].tolist() == [1, 0]
roi_align = sys.modules["torchvision.ops.roi_align"]
assert roi_align.is_compile_supported("cpu") is torch._dynamo.utils.is_compile_supported("cpu")
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
assert isinstance(masking.TransformGetItemToIndex(), TransformGetItemToIndex)
values = torch.arange(4.0)
assert torch.equal(torch.compile(lambda x: 2 * x + 1, backend="eager", fullgraph=True)(values), 2 * values + 1)
print("well")
"""

# Modules and names without a stand-in are the real ones, and the same as after the block.
OTHER = """
import sys
from priorclip.common.late_imports import late_imports
import torch
with late_imports():
    import torch._dynamo
    stand_in = sys.modules["torch._dynamo"]
    {ask}
assert sys.modules["torch._dynamo"] is not stand_in, "still a stand-in"
assert sys.modules["torch._dynamo"] is torch._dynamo
assert found is {real}
import torch._dynamo.config
assert torch._dynamo.config.__spec__.loader is not None
print("well")
"""


def output_of(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]  # DeepSpeed may warn before it


def test_trainings_do_not_import_the_compiler_and_can_call_it() -> None:
    assert output_of(WHOLE) == "well"


@pytest.mark.parametrize(
    ("ask", "real"),
    [
        ("found = stand_in.optimize", "torch._dynamo.optimize"),
        ("from torch._dynamo import config as found", "torch._dynamo.config"),
    ],
)
def test_what_has_no_stand_in_is_real(ask: str, real: str) -> None:
    assert output_of(OTHER.format(ask=ask, real=real)) == "well"


# Two modules as DeepSpeed's tuner and mlflow: ``heavy`` tells when it is imported.
WITHIN = """
import importlib.util, sys
from priorclip.common.late_imports import late_within
late_within("tuner", "heavy")
import tuner
{before}
assert tuner.heavy.answer == 42 and sys.modules["heavy"].answer == 42
assert tuner.__spec__.loader is tuner.__loader__ and tuner.__loader__.path == tuner.__file__
print(tuner.has_heavy, "well")
"""
TUNER = """
try:
    import heavy
    has_heavy = True
    {within}
except ImportError:
    has_heavy = False
"""


@pytest.mark.parametrize("within", ["", "assert heavy.answer == 42"], ids=["later", "at-once"])
def test_a_module_that_another_one_imports_for_nothing_comes_late(tmp_path: Path, within: str) -> None:
    (tmp_path / "heavy.py").write_text("answer = 42\n")
    (tmp_path / "tuner.py").write_text(TUNER.format(within=within))
    before = "" if within else "assert 'heavy' not in sys.modules and importlib.util.find_spec('heavy')"
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + WITHIN.format(before=before)
    assert output_of(program) == "True well"


def test_a_module_that_is_not_installed_is_still_missed(tmp_path: Path) -> None:
    (tmp_path / "tuner.py").write_text(TUNER.format(within=""))
    program = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from priorclip.common.late_imports import late_within
late_within("tuner", "heavy")
import tuner
print(tuner.has_heavy)
"""
    assert output_of(program) == "False"


def test_deepspeed_does_not_bring_mlflow() -> None:
    program = """
import sys
import priorclip.training
import deepspeed
assert not {"mlflow", "pandas", "scipy"} & set(sys.modules), "imported"
from deepspeed.autotuning import autotuner
import mlflow
print(autotuner.has_mlflow, autotuner.mlflow.log_metrics is mlflow.log_metrics)
"""
    assert output_of(program) == "True True"
