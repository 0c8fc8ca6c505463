"""Other programs read a pack as it is: open_clip's own trainer by KEY.txt and sizes.json, wids by its index, and
datasets of Hugging Face as a stream of members."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import wids
from remote_data import open_shards
from remote_server import serving
from small_data import encoded, picture, records, write_tar

from benchmarks.open_clip_trainer import TRAINER
from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.inspect.verify import verify_folder
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources import Record

TINY = {  # a model of open_clip for the trainer
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images in shards of 5, with 0 to 3 captions each, and folders in their keys."""
    folder = tmp_path_factory.mktemp("clients") / "shards"
    made = [
        Record(
            f"scene/{number:02d}",
            encoded(picture(number)),
            [f"caption {number} {k}" for k in range(number % 4)],
            "pond",
        )
        for number in range(13)
    ]
    pack(made, folder, PackPlan(shard_size=5, template_captions=False))
    return folder


def test_the_first_caption_is_a_text_of_its_own(packed: Path) -> None:
    """Our readers do not count it twice."""
    texts: dict[str, str] = {}
    for path in sorted(packed.glob("*.tar")):
        with tarfile.open(path) as tar:
            texts |= {name: tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")}  # type: ignore[union-attr]
    assert texts == {f"scene/{number:02d}.txt": f"caption {number} 0" for number in range(13) if number % 4}
    shards, manifest = ShardSet(str(packed)), Manifest.load(packed)
    assert manifest is not None
    assert manifest.captions == sum(number % 4 for number in range(13)) == 18
    assert [len(shards.read(number).captions) for number in range(13)] == [number % 4 for number in range(13)]
    assert verify_folder(packed) == ([], 13)


def test_open_clips_trainer_trains_on_a_pack(packed: Path, tmp_path: Path) -> None:
    """It takes the number of samples from sizes.json, which are those with a caption. Without KEY.txt it hangs."""
    assert json.loads((packed / "sizes.json").read_text()) == {
        "shard-000000.tar": 3, "shard-000001.tar": 4, "shard-000002.tar": 2,
    }  # fmt: skip
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    code = TRAINER.format(model=str(tmp_path / "tiny.json"))
    words = [
        "--train-data",
        f"{packed}/shard-{{000000..000002}}.tar",
        "--dataset-type",
        "webdataset",
        "--model",
        "tiny",
    ]
    words += ["--batch-size", "3", "--epochs", "2", "--workers", "1", "--device", "cpu", "--precision", "fp32"]
    words += ["--logs", str(tmp_path / "logs"), "--name", "run", "--warmup", "1", "--log-every-n-steps", "1"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=variables, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "logs" / "run" / "out.log").read_text()
    losses = [float(found) for found in re.findall(r"Contrastive_loss: ([\d.]+)", log)]
    assert len(losses) == 6, log[-3000:]  # two epochs of 9 samples in batches of 3
    assert all(0 < loss < 5 for loss in losses)


def test_wids_reads_a_pack_by_its_index(packed: Path, tmp_path: Path) -> None:
    found = wids.ShardListDataset(str(packed / "wids.json"), cache_dir=str(tmp_path / "cache"), keep=True)
    shards = ShardSet(str(packed))
    assert len(found) == 13
    for number in (12, 0, 6):
        sample, own = found[number], shards.read(number)
        assert sample["__key__"] == own.key
        assert sample[".json"]["captions"] == own.captions
        assert sample[".jpg"].size == (own.info["width"], own.info["height"])
    assert found[6][".txt"] == "caption 6 0"


def test_datasets_of_hugging_face_streams_a_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the shards, with the first caption, all captions and the picture of each sample."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    pack(records(7), tmp_path / "shards", PackPlan(shard_size=3))
    files = {"train": str(tmp_path / "shards" / "shard-*.tar")}
    found = list(datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True))
    shards = ShardSet(str(tmp_path / "shards"))
    assert len(found) == len(shards) == 7
    for number, sample in enumerate(found):
        own = shards.read(number)
        assert (sample["__key__"], sample["txt"]) == (own.key, own.captions[0])
        assert sample["json"]["captions"] == own.captions
        assert sample["jpg"].size == (own.info["width"], own.info["height"])


def test_files_of_clients_are_part_of_the_pack(packed: Path, tmp_path: Path) -> None:
    """Written again byte for byte, checked by verify, renewed by index, and removed by --overwrite."""
    made, plan = [Record(f"{n}", encoded(picture(n)), ["one", "two"], "pond") for n in range(4)], PackPlan(shard_size=2)
    folder = tmp_path / "a"
    pack(made, folder, plan)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"sizes.json", "wids.json"} <= set(first)
    pack(made, folder, plan, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first

    (folder / "sizes.json").write_text('{"shard-000000.tar": 3}')
    (folder / "wids.json").unlink()
    problems, _ = verify_folder(folder)
    assert problems == [
        "sizes.json: does not fit the shards; `data_shards index --overwrite` writes it again", "wids.json: missing",
    ]  # fmt: skip
    assert main(["index", "--shards", str(folder), "--overwrite", "true", "--workers", "1"]) == 0
    assert verify_folder(folder) == ([], 4)
    assert all((folder / name).read_bytes() == first[name] for name in ("sizes.json", "wids.json"))
    pack(records(3), folder, PackPlan(prefix="other"), overwrite=True)
    assert set(json.loads((folder / "sizes.json").read_text())) == {"other-000000.tar"}


def test_shards_of_others_keep_their_own_sizes(tmp_path: Path, packed: Path) -> None:
    """A sizes.json that pack did not write is left alone by index, and verify has no say in it."""
    (tmp_path / "a.tar").write_bytes((packed / "shard-000000.tar").read_bytes())
    (tmp_path / "sizes.json").write_text('{"a.tar": 5}')
    assert main(["index", "--shards", str(tmp_path), "--workers", "1"]) == 0
    assert (tmp_path / "sizes.json").read_text() == '{"a.tar": 5}'
    assert not (tmp_path / "wids.json").exists()
    assert verify_folder(tmp_path) == ([], 5)


@pytest.mark.usefixtures("quick_retries")
def test_remote_sets_of_clip_benchmark_are_read_as_local_ones(tmp_path: Path) -> None:
    """The files lie one folder above the tars. A set with KEY.json asks for neither of them."""
    members: dict[str, dict[str, bytes]] = {"retrieval": {}, "classes": {}, "plain": {}}
    for number in range(3):
        image = encoded(picture(number))
        members["retrieval"] |= {f"s{number}.jpg": image, f"s{number}.txt": b"one\ntwo"}
        members["classes"] |= {f"s{number}.jpg": image, f"s{number}.cls": b"%d" % number}
        members["plain"] |= {f"s{number}.jpg": image, f"s{number}.txt": b"one\ntwo", f"s{number}.json": b"{}"}
    for name, content in members.items():
        (tmp_path / name / "test").mkdir(parents=True)
        write_tar(tmp_path / name / "test" / "0.tar", content)
    (tmp_path / "retrieval" / "dataset_type.txt").write_text("retrieval\n")
    (tmp_path / "classes" / "classnames.txt").write_text("pond\nriver\nforest\n")
    with serving(tmp_path) as server:
        found = {name: open_shards(f"{server.url}/{name}/test/0.tar", tmp_path) for name in members}
        assert found["retrieval"].read(1).captions == ["one", "two"]
        assert [found["classes"].read(number).label for number in range(3)] == ["pond", "river", "forest"]
        assert found["classes"].classes == ["forest", "pond", "river"]
        assert found["plain"].read(1).captions == ["one\ntwo"]
        assert not server.of(r"^/plain/.*\.txt$")
