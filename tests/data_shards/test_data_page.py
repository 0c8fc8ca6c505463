"""docs/getting-the-data.md: each command runs on small files of the published layouts.

The stand-ins have the files, columns and folders of the releases, and pictures of 40 x 32 pixels.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from house import ROOT
from PIL import Image
from small_data import write_tar
from source_packs import jpeg

from priorclip.data_shards import ShardSet
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.manifest import Manifest

PAGE = (ROOT / "docs/getting-the-data.md").read_text()
BLOCK = re.compile(r"^```bash\n((?:.*\n)*?)```$", re.MULTILINE)
LOOP = re.compile(r"for split in ([\w ]+); do\n((?:.*\n)*?)done\n")
NAME = re.compile(r"data/[a-z0-9-]+")
DRAWN = set(re.findall(r"--output (data/[a-z-]+)", (ROOT / "docs/training.md").read_text()))


def commands() -> list[list[str]]:
    """Returns the words of each command of the page behind `python -m data_shards`, loops unrolled."""
    text = "".join(BLOCK.findall(PAGE))
    text = LOOP.sub(lambda found: "".join(found[2].replace("$split", name) for name in found[1].split()), text)
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines if line.strip()]
    assert all(line[:3] == ["python", "-m", "data_shards"] for line in words), words
    return [line[3:] for line in words]


def karpathy(name: str, images: Path, first: int, splits: tuple[str, ...], scenes: tuple[str, ...]) -> None:
    """Writes dataset_NAME.json and two images of each split, from picture number ``first`` on."""
    images.mkdir()
    entries = []
    for number in range(2 * len(splits)):
        file = f"{scenes[number % 2]}_{number}.jpg"
        (images / file).write_bytes(jpeg(first + number))
        sentences = [{"raw": f"a {file} seen from above, {index}"} for index in range(5)]
        entries.append({"filename": file, "split": splits[number // 2], "sentences": sentences})
    Path(f"dataset_{name}.json").write_text(json.dumps({"dataset": name, "images": entries}))


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of somebody who has downloaded everything, after all commands of the page."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        karpathy("rsicd", Path("RSICD"), 0, ("train", "val", "test"), ("airport", "beach"))
        karpathy("rsitmd", Path("RSITMD"), 10, ("train", "test"), ("airport", "park"))
        karpathy("ucm", Path("UCM"), 20, ("train", "test"), ("river", "forest"))
        for number in range(8):  # numbers 4 and 5 are RSICD's test images, as RSICD has AID's
            path = Path("AID", ("airport", "beach")[number % 2], f"{number}.jpg")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(number if number in (4, 5) else 30 + number))
        for number in range(2):
            path = Path("RESISC45", ("lake", "stadium")[number], f"{number}.jpg")
            path.parent.mkdir(parents=True)
            path.write_bytes(jpeg(40 + number))
        Path("data/rs5m").mkdir(parents=True)
        for name, first in (("pub11-train-0000", 50), ("rs3-train-0000", 5)):  # picture 5 is a test image of RSICD
            members = {}
            for number in range(2):
                key = f"{name}{number}"
                members |= {
                    f"{key}.img_content": jpeg(first + 50 * number),
                    f"{key}.img_name": b"x",
                    f"{key}.caption": b"a port",
                }
            write_tar(Path(f"data/rs5m/{name}.tar"), members)
        for kind in ("images2", "meta2"):
            Path("SkyScript", kind).mkdir(parents=True)
        Path("SkyScript/images2/a1_CH_19.jpg").write_bytes(jpeg(60))
        meta = {"box": (7.4, 46.9, 7.5, 47.0), "time": (2019, 7, 1, 10, 30), "center_tags": {}, "surrounding_tags": []}
        Path("SkyScript/meta2/a1_CH_19.pickle").write_bytes(pickle.dumps(meta))
        Path("SkyScript_train_top30pct_filtered_by_CLIP_openai.csv").write_text(
            "filepath,title,title_multi_objects\nimages2/a1_CH_19.jpg,farmland,farmland beside a road\n"
        )
        place = Path("fmow-rgb/train/airport/airport_0")
        place.mkdir(parents=True)
        (place / "airport_0_0_rgb.jpg").write_bytes(jpeg(61))
        boxes = [{"ID": 0, "box": [3, 2, 20, 20], "category": "airport"}]
        (place / "airport_0_0_rgb.json").write_text(json.dumps({"gsd": 0.5, "bounding_boxes": boxes}))
        patch_id = "S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57"
        bands = Path("BigEarthNet/BigEarthNet-S2", patch_id.removesuffix("_26_57"), patch_id)
        bands.mkdir(parents=True)
        for number, band in enumerate(("B04", "B03", "B02")):
            Image.fromarray(np.full((8, 8), 500 * number, np.uint16)).save(bands / f"{patch_id}_{band}.tif")
        table = {"patch_id": [patch_id], "labels": [["Arable land", "Urban fabric"]], "split": ["train"]}
        pyarrow.parquet.write_table(pyarrow.table(table), "BigEarthNet/metadata.parquet")

        for words in commands():
            smaller = ["2" if word == "2010" else word for word in words]  # of AID's 10,000 images
            assert main([*smaller, "--workers", "1"]) == (words[0] == "leakage"), words  # it finds picture 5
    return folder


def keys(folder: Path) -> set[str]:
    shards = ShardSet(str(folder))
    return {shards.key(sample) for sample in range(len(shards))}


def test_every_pack_has_what_the_page_says(reader: Path) -> None:
    data = reader / "data"
    counts = {}
    for path in data.iterdir():
        manifest = Manifest.load(path)
        assert manifest is not None
        counts[path.name] = manifest.samples
    ones, twos = ("skyscript", "fmow", "bigearthnet"), ("resisc45", "aid-test", "rsicd-val", "ucm-train", "ucm-test")
    twos += ("rsicd-train", "rsicd-test", "rsitmd-train", "rsitmd-test")
    more = {"ret2-train": 4, "ret3-train": 6, "rs5m": 4, "aid-train": counts["aid-train"]}
    assert counts == dict.fromkeys(ones, 1) | dict.fromkeys(twos, 2) | more
    test, train = keys(data / "aid-test"), keys(data / "aid-train")
    everything = {
        path.relative_to(reader / "AID").with_suffix("").as_posix() for path in (reader / "AID").rglob("*.jpg")
    }
    assert train == everything - test - {"airport/4", "beach/5"}  # RSICD's test images
    assert len({key.split("/")[0] for key in test}) == 2
    sky = ShardSet(str(data / "skyscript")).read(0)
    assert (sky.captions, sky.info["acquired"]) == (["farmland", "farmland beside a road"], "2019-07-01T10:30:00")
    assert ShardSet(str(data / "bigearthnet")).read(0).info["labels"] == ["Arable land", "Urban fabric"]


def test_configurations_name_only_what_the_pages_make() -> None:
    made = {words[words.index("--output") + 1] for words in commands() if "--output" in words} | {"data/rs5m"}
    for folder in ("pretrain/configs", "finetune/configs", "experiments/data"):
        for path in sorted((ROOT / folder).glob("*.yaml")):
            named = set(NAME.findall(path.read_text()))
            assert named <= made | DRAWN, f"{path.name} names {named - made - DRAWN}"
    default = set(NAME.findall((ROOT / "experiments/data/default.yaml").read_text()))
    assert {"data/rsitmd-train", "data/rsitmd-test", "data/aid-train", "data/rs5m"} <= default
