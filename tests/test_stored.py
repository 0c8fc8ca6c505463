"""Today's code reads the files of version 0.1: shards, a checkpoint, exports, an index and configurations.

``tests/stored/make.py`` made the files with the code of commit d16022c. It also recorded what that code computes from
them, in ``expected.json``. The last digits of a float depend on the CPU: with other vector instructions the losses
changed by up to 4e-7 of their value.
"""

from __future__ import annotations

import json
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from stored.trials import CONFIGS, LAST_STEP, WRITTEN_STEPS, Place, resumed, used

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "stored"
EXPECTED: dict[str, Any] = json.loads((STORED / "expected.json").read_text())
CLOSE = 1e-5
# Packages whose classes the pickles of a checkpoint may name. None of them is ours.
FOREIGN = {"collections", "deepspeed", "torch"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """This checkout, and a copy of the stored files. Commands may change the copy."""
    return Place(ROOT, STORED / "v0.1").copy(tmp_path / "stored")


@pytest.mark.parametrize(("name", "samples"), [("train", 24), ("held-out", 12)])
def test_shards_verify(place: Place, name: str, samples: int) -> None:
    """Tar, index and manifest, with every offset and hash."""
    assert f"{samples} samples checked, 0 problems" in place.run("data_shards", "verify", f"shards/{name}")


@pytest.mark.parametrize(("ranks", "name"), [(2, "two_ranks"), (1, "one_rank")])
def test_run_goes_on(place: Place, ranks: int, name: str) -> None:
    """The checkpoint is of two ranks under ZeRO 2. Losses, learning rates and averages are those of version 0.1."""
    found, expected = resumed(place, ranks), EXPECTED[name]
    assert found["resumed"] == [str(WRITTEN_STEPS)]
    assert found["reshaped"] == (ranks == 1)
    assert found["steps"] == expected["steps"]
    assert found["steps"][-4:] == list(range(WRITTEN_STEPS, LAST_STEP + 1))
    assert found["lr"] == pytest.approx(expected["lr"], rel=1e-9)
    assert found["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
    assert found["norms"] == pytest.approx(expected["norms"], rel=CLOSE, abs=1e-7)


@pytest.fixture(scope="module")
def use(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A copy of the files in which exports, index and checkpoint were used, and what that gave."""
    place = Place(ROOT, STORED / "v0.1").copy(tmp_path_factory.mktemp("used") / "stored")
    return place.folder, used(place)


def test_checkpoint_is_exported(use: tuple[Path, dict[str, Any]]) -> None:
    """With the same weights that the run exported at its end."""
    again, before = (load_file(use[0] / name / "model.safetensors") for name in ("again", "run/export"))
    assert again.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("name", ["run", "closed"])
def test_export_is_evaluated(use: tuple[Path, dict[str, Any]], name: str) -> None:
    """A PriorCLIP and a PriorITR. One caption of the 120 is 0.8 % of a recall."""
    assert use[1]["recalls"][name] == pytest.approx(EXPECTED["recalls"][name], abs=0.5)


def test_index_is_searched(use: tuple[Path, dict[str, Any]]) -> None:
    found, expected = use[1]["hits"], EXPECTED["hits"]
    assert [key for key, _ in found] == [key for key, _ in expected]
    assert [score for _, score in found] == pytest.approx([score for _, score in expected], abs=2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_read(place: Place, name: str) -> None:
    """Each stored value is read as it is. A later version may add options, but it may not lose one."""
    words = CONFIGS[name]
    stored = yaml.safe_load((place.folder / words[-1]).read_text())
    assert differences(stored, yaml.safe_load(place.run(*words, "--print_config"))) == []


def differences(stored: Any, read: Any, where: str = "") -> list[str]:
    """Stored values that are lost or changed, by dotted key."""
    if isinstance(stored, dict) and isinstance(read, dict):
        return [found for key, value in stored.items() for found in differences(value, read.get(key), f"{where}.{key}")]
    return [] if stored == read else [f"{where}: {stored!r} became {read!r}"]


def test_pickles_name_no_class_of_ours() -> None:
    """If a pickle names a class, the class can never move to another module."""
    files = sorted((STORED / "v0.1").rglob("*.pt"))
    assert len(files) == 9
    found = {name for path in files for name in globals_of(path)}
    assert {name.split(".")[0] for name in found} == FOREIGN


def globals_of(path: Path) -> set[str]:
    """Modules of the classes and functions that a file of ``torch.save`` names."""
    with zipfile.ZipFile(path) as archive:
        pickles = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    assert pickles
    found = [(code.name, text) for content in pickles for code, text, _ in pickletools.genops(content)]
    assert not any(code == "STACK_GLOBAL" for code, _ in found), "torch writes protocol 2, which has GLOBAL only"
    return {str(text).split(" ")[0] for code, text in found if code == "GLOBAL"}
