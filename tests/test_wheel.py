"""The wheel has one importable name, is complete, and works beside folders of others that have the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STORED = ROOT / "tests" / "stored" / "v0.1"
FOLDERS = ("cluster", "common", "data_shards", "experiments", "finetune", "model", "pretrain", "retrieval", "training")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that git tracks, or would track."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS, "priorclip", "setup.py",
              "pyproject.toml", "README.md", "LICENSE"]  # fmt: skip
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_symlink() or (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name, follow_symlinks=False)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        folder,
    ]
    subprocess.run([*build, folder / "source"], check=True, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel alone. Its dependencies are read from where the tests have theirs."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working folder with somebody else's packages of our folders' names. None of them may be imported."""
    for name in (*FOLDERS, "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('this is the {name} of somebody else')\n")
    (tmp_path / "options.py").write_text("raise ImportError('these are the options of somebody else')\n")
    return tmp_path


def run(environment: Path, folder: Path, *words: object) -> str:
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    variables |= {"PATH": f"{environment}/bin{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    command = list(map(str, words))
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_wheel_has_one_package_and_all_of_its_files(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"priorclip"}
    kinds = (".py", ".yaml", ".json", ".html", ".sbatch")
    for folder in FOLDERS:
        files = [path for path in (ROOT / folder).rglob("*") if path.suffix in kinds and path.is_file()]
        expected = {f"priorclip/{path.relative_to(ROOT)}" for path in files}
        assert expected
        assert expected <= names, f"not in the wheel: {sorted(expected - names)}"
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert "# PriorCLIP" in zipfile.ZipFile(wheel).read(metadata).decode()


def test_python_beside_folders_of_the_same_names(installed: Path, elsewhere: Path) -> None:
    program = (
        "from priorclip.model import from_pretrained; import priorclip, sys; "
        "model = from_pretrained(sys.argv[1]); print(type(model).__name__, priorclip.__file__)"
    )
    kind, place = run(installed, elsewhere, "python", "-c", program, STORED / "run" / "export").split()
    assert kind == "PriorCLIP"
    assert Path(place).is_relative_to(installed)


def test_an_export_is_evaluated_and_a_run_is_launched(installed: Path, elsewhere: Path) -> None:
    figures, shards = elsewhere / "recall.json", STORED / "shards" / "held-out"
    run(installed, elsewhere, "priorclip", "evaluate", "--model", STORED / "run" / "export", "--data",
        shards, "--output", figures)  # fmt: skip
    assert '"mean_recall"' in figures.read_text()
    run(installed, elsewhere, "priorclip", "launch", "--nproc", 2, "--", "pretrain", "--config",
        STORED / "run" / "config.yaml", "--data.shards", shards, "--evaluation.shards", "null",
        "--tokenizer", STORED / "run" / "export", "--model.prior.weights", STORED / "prior" / "export",
        "--run.dir", "run", "--run.max_steps", 1)  # fmt: skip
    assert (elsewhere / "run" / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pretrain", "--help"), "--preset"),
        (("pack", "--help"), "--source"),
        (("plan", "--help"), "--gpus"),
        (("sbatch", "--nodes", "2", "--dry-run", "--", "pretrain", "--run.dir", "x"), "-m priorclip.pretrain"),
        (("sweep", "filter-size", "--seeds", "1", "--dry-run"), "priorclip.finetune"),
        (("summary", "--preset", "priorclip-tiny"), "prior"),
    ],
)
def test_commands_find_their_files(installed: Path, elsewhere: Path, words: tuple[str, ...], expected: str) -> None:
    assert expected in run(installed, elsewhere, "priorclip", *words)
