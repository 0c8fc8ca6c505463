"""`retrieval index` goes on after SIGKILL, and its index has the bytes of an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_galleries import TestSet

from priorclip.common.files import file_aside, sha256_of
from priorclip.data_shards.stream.evaluation_batches import ImageFetcher
from priorclip.retrieval import EmbeddingIndex, identity
from priorclip.retrieval.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
import priorclip.retrieval.indexing.index_parts as parts
from priorclip.retrieval.__main__ import main
save_file, written = parts.save_file, []

def save_or_die(tensors, path, about):
    save_file(tensors, path, about)
    written.append(path)
    if len(written) == 3:  # the third part is written, but has not its name yet
        os.kill(os.getpid(), signal.SIGKILL)

parts.save_file = save_or_die
main(sys.argv[1:])
"""


def words_of(test_set: TestSet, output: Path) -> list[str]:
    data = ["--data", str(test_set.json), "--images", str(test_set.images), "--device", "cpu"]
    words = ["index", "--model", str(test_set.export), *data, "--batch_size", "4"]
    return [*words, "--keep_every", "6", "--output", str(output)]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def undisturbed(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "index"
    assert main(words_of(test_set, output)) == 0
    assert [path.name for path in output.parent.iterdir()] == ["index"]  # no parts are left
    return content(output)


@pytest.fixture(scope="module")
def killed(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves that SIGKILL ends after 24 images of which 16 are in whole parts."""
    output = tmp_path_factory.mktemp("killed") / "index"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words_of(test_set, output)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    return output


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indices of the images that are read for the model."""
    found: list[int] = []
    read = ImageFetcher.__getitems__

    def counting(fetcher: ImageFetcher, indices: list[int]) -> dict:
        found.extend(indices)
        return read(fetcher, indices)

    monkeypatch.setattr(ImageFetcher, "__getitems__", counting)
    return found


def copied(killed: Path, folder: Path) -> Path:
    """Returns the place of the index in a copy of what the killed run left."""
    shutil.copytree(killed.parent, folder / "copy")
    return folder / "copy" / killed.name


def test_the_rest_of_a_killed_run_is_no_index(killed: Path) -> None:
    parts = killed.with_name(".index.parts")
    assert not killed.exists()
    assert sorted(path.name for path in parts.glob("*.safetensors")) == [
        "part-000000.safetensors",
        "part-000002.safetensors",
    ]
    assert len(list(parts.glob("*.tmp"))) == 1
    for folder in (killed, parts):
        with pytest.raises(FileNotFoundError, match="is no image index"):
            EmbeddingIndex.load(folder)


def test_a_killed_index_goes_on(
    test_set: TestSet, killed: Path, undisturbed: dict[str, bytes], tmp_path: Path, seen: list[int]
) -> None:
    output = copied(killed, tmp_path)
    assert main(words_of(test_set, output)) == 0
    assert seen == list(range(16, 24))
    assert content(output) == undisturbed
    assert [path.name for path in output.parent.iterdir()] == ["index"]


@pytest.mark.parametrize("change", ["options", "images", "damage", "weights"])
def test_parts_that_do_not_belong_to_the_index_are_encoded_again(
    test_set: TestSet, killed: Path, undisturbed: dict[str, bytes], tmp_path: Path, seen: list[int],
    change: str, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    output = copied(killed, tmp_path)
    words = words_of(test_set, output)
    again = range(24)
    if change == "options":
        words += ["--dtype", "float32"]
    elif change == "damage":
        part = output.with_name(".index.parts") / "part-000002.safetensors"
        data = bytearray(part.read_bytes())
        data[-20] ^= 1
        part.write_bytes(data)
        again = range(8, 24)
    elif change == "images":
        shutil.copytree(test_set.images, tmp_path / "images")  # other times of change
        os.utime(next((tmp_path / "images").rglob("*_3.png")))
        words[words.index("--images") + 1] = str(tmp_path / "images")
    else:
        shutil.copytree(test_set.export, tmp_path / "export")
        with file_aside(tmp_path / "export" / "config.json") as aside:
            aside.write_text((test_set.export / "config.json").read_text() + " ")
        words[words.index("--model") + 1] = str(tmp_path / "export")
    assert main(words) == 0
    assert seen == list(again)
    if change in ("damage", "weights"):
        assert content(output)["embeddings.safetensors"] == undisturbed["embeddings.safetensors"]
    reason = "is damaged" if change == "damage" else "is of another model, other options or other images"
    assert caplog.text.count(reason) == (1 if change == "damage" else 2)


def test_the_weights_are_read_once_for_their_hash(
    test_set: TestSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in the same place that have changed are read again."""
    export = shutil.copytree(test_set.export, tmp_path / "export")
    words = words_of(test_set, tmp_path / "index")
    words[words.index("--model") + 1] = str(export)
    hashed: list[Path] = []

    def counting(path: Path) -> str:
        hashed.append(path)
        return sha256_of(path)

    monkeypatch.setattr(identity, "sha256_of", counting)
    assert main([*words, "--limit", "4"]) == 0
    assert hashed == [export / "model.safetensors"]
    with file_aside(export / "model.safetensors") as aside:
        aside.write_bytes(b"other")
    assert identity.model_hash(export) == sha256_of(export / "model.safetensors")


def test_keep_every_is_checked(test_set: TestSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(test_set, tmp_path / "index")
    words[words.index("--keep_every") + 1] = "0"
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "--keep_every must be at least 1, not 0" in capsys.readouterr().err
