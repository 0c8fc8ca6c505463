"""The recipes of the container, without a container runtime: the steps that both recipes call are run here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from toy_launches import ROOT

from priorclip.cluster.commands import SbatchConfig
from priorclip.cluster.launch.sbatch import render_script

FOLDER = ROOT / "cluster" / "container"
STEP = re.compile(r"cluster/container/install (\w+)")
RUN = ["pretrain", "--config", "run.yaml"]


def instructions() -> list[tuple[str, str]]:
    """Word and arguments of each instruction of the Dockerfile."""
    text = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def recipe() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Headers of the Apptainer recipe, and the lines of each of its sections."""
    headers: dict[str, str] = {}
    sections: dict[str, list[str]] = {}
    section = ""
    for line in (FOLDER / "priorclip.def").read_text().splitlines():
        if line.startswith("%"):
            section = line.removeprefix("%")
            sections[section] = []
        elif line.strip() and not line.startswith("#"):
            if section:
                sections[section].append(line.strip())
            else:
                name, _, value = line.partition(": ")
                headers[name] = value
    return headers, sections


def copied() -> list[str]:
    """Files and folders of the checkout that the Docker image is made from."""
    lines = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in lines
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def test_both_recipes_have_the_same_content() -> None:
    headers, sections = recipe()
    docker = instructions()
    assert headers == {"Bootstrap": "docker", "From": dict(docker)["FROM"]}
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-devel-ubuntu\d+\.\d+", headers["From"])
    steps = STEP.findall(" ".join(words for name, words in docker if name == "RUN"))
    assert steps == ["system", "dependencies", "package", "check"]
    assert STEP.findall(" ".join(sections["post"] + sections["test"])) == steps
    assert [line.split()[0] for line in sections["files"]] == copied()


def test_the_cuda_of_the_image_is_that_of_the_pins() -> None:
    """DeepSpeed refuses to compile its operators with another CUDA than torch's."""
    (pinned,) = re.findall(r"^nvidia-cuda-runtime==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert dict(instructions())["FROM"].startswith(f"nvidia/cuda:{pinned}.")


def test_the_image_runs_as_a_plain_user() -> None:
    names = [name for name, _ in instructions()]
    user = dict(instructions())["USER"]
    assert int(user) > 0
    assert f"--uid {user} " in next(words for name, words in instructions() if "useradd" in words)
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")


def test_hadolint_has_no_complaint() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([linter, FOLDER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with only what the image is made from, and the virtual environment that the image has. The
    dependencies are those of the tests, because an installation from the internet takes minutes."""
    folder = tmp_path_factory.mktemp("image")
    for name in copied():
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, folder / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    packages = next((folder / "venv").glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return folder


def install(folder: Path, step: str, **variables: str) -> subprocess.CompletedProcess[str]:
    offline = {"PREFIX": str(folder / "venv"), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CI")}
    return subprocess.run(
        [folder / "cluster" / "container" / "install", step], env={**inherited, **offline, **variables},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_the_pins_meet_the_requirements(image: Path) -> None:
    """A dry run: with the versions of the tests, which are the pinned ones, only priorclip is missing."""
    done = install(image, "dependencies", PIP_DRY_RUN="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("Would install")] == [
        "Would install priorclip-pretraining-0.1.0"
    ]


def test_the_image_passes_its_check(image: Path) -> None:
    """The package is installed from the copied files alone, and imported from there."""
    done = install(image, "package")
    assert done.returncode == 0, done.stdout + done.stderr
    done = install(image, "check")
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("DeepSpeed 0.", "usage: priorclip COMMAND", "/mpirun", "/pdsh", "/ssh"):
        assert words in done.stdout


def test_system_packages_leave_no_cache(image: Path, tmp_path: Path) -> None:
    """On a machine that has none of them; stand-ins note what would be done to it."""
    log = tmp_path / "log"
    for name, code in (("apt-get", 0), ("dpkg-query", 1), ("rm", 0)):
        (tmp_path / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {log}\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "id").write_text("#!/bin/bash\necho 0\n")
    (tmp_path / "id").chmod(0o755)
    done = install(image, "system", PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stdout + done.stderr
    done_to = [line for line in log.read_text().splitlines() if not line.startswith("dpkg-query")]
    listed = [line for line in (FOLDER / "packages.txt").read_text().splitlines() if not line.startswith("#")]
    assert done_to[:2] == ["apt-get update -q", f"apt-get install -q -y --no-install-recommends {' '.join(listed)}"]
    assert done_to[2].startswith("rm -rf /var/lib/apt/lists")


def test_unknown_step_is_an_error(image: Path) -> None:
    done = install(image, "everything")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'everything' is not one of system, dependencies, package, check" in done.stderr


def test_the_container_of_a_job_sees_data_and_runs() -> None:
    mounts = "/data,/scratch/my runs:/runs"
    apptainer = render_script(SbatchConfig(container="rs.sif", container_mounts=mounts), RUN)
    assert f"--bind '{Path.cwd()},/data,/scratch/my runs:/runs' --pwd {Path.cwd()} rs.sif" in apptainer
    pyxis = render_script(SbatchConfig(container="rs", container_runtime="pyxis", container_mounts=mounts), RUN)
    assert f"'--container-mounts={Path.cwd()}:{Path.cwd()},/data:/data,/scratch/my runs:/runs'" in pyxis
    subprocess.run(["bash", "-n"], input=apptainer + pyxis, text=True, check=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SbatchConfig(container_mounts="/data"), "--container-mounts needs --container"),
        (SbatchConfig(container="rs.sif", container_mounts="data"), "'data': write an absolute path"),
        (SbatchConfig(container="rs.sif", container_mounts="/data,"), "'': write an absolute path"),
        (SbatchConfig(container="rs.sif", container_mounts="/data:runs"), "'/data:runs': write an absolute path"),
    ],
)
def test_a_wrong_mount_is_refused(config: SbatchConfig, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        render_script(config, RUN)
