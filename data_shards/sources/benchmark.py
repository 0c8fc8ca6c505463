"""Annotation files of the retrieval benchmarks: RSICD, RSITMD, UCM-Captions, Sydney-Captions.

    karpathy("dataset_rsicd.json", "RSICD_images")      {"images": [{"filename", "split", "sentences": [{"raw"}]}]}
    precomp("rsitmd_precomp", "images", "test")         test_caps.txt, test_filename.txt

Scene labels come from the annotation, a CSV, or the stem of the file name, see ``labels``:

    RSICD     airport_1.jpg names its scene, 00815.jpg (one in twelve) does not; its labels.csv has all labels
    RSITMD    each stem names the scene: railwaystation_101.tif
    UCM       1.tif ... 2100.tif, 100 of each of 21 scenes in alphabetical order; the captions confirm this
    Sydney    1.tif ... 613.tif: no labels
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from priorclip.common.untrusted_json import read_regular
from priorclip.data_shards.sources.annotation_fields import check, read_json, take
from priorclip.data_shards.sources.names import make_labeller, sample_key
from priorclip.data_shards.sources.record import ImageFile, Record, keep_split
from priorclip.data_shards.sources.table import label_table

UCM_SCENES = (
    *("agricultural", "airplane", "baseballdiamond", "beach", "buildings", "chaparral", "denseresidential", "forest"),
    *("freeway", "golfcourse", "harbor", "intersection", "mediumresidential", "mobilehomepark", "overpass"),
    *("parkinglot", "river", "runway", "sparseresidential", "storagetanks", "tenniscourt"),
)
UCM_WORDS = {  # a word of most captions of a scene, if the numbers are in UC Merced's order
    "airplane": "plane",
    "beach": "beach",
    "forest": "forest",
    "freeway": "freeway",
    "golfcourse": "golf",
    "harbor": "harbo",
    "intersection": "intersection",
    "overpass": "overpass",
    "river": "river",
    "runway": "runway",
    "tenniscourt": "tennis",
}
MAX_LINES = 4 << 30  # bytes of a text file
SET_NAME = re.compile(r"(?P<split>.+)_caps\.txt")


def karpathy(
    json_file: str | Path, images: str | Path, split: str | None = None, labels: str | Path | None = None
) -> list[Record]:
    """Reads a Karpathy JSON.

    Args:
        json_file: ``{"dataset": ..., "images": [{"filename", "split", "sentences": [{"raw"}], "label"?}]}``; a sentence
            may be a plain text, ``scene`` may stand for ``label``, and an image without sentences is labelled only
        images: folder of the images; file names are relative to it
        split: keep this split; None keeps all
        labels: CSV with the columns filename and label, or "none". None takes the record's ``label`` or ``scene``, the
            stem of the file name (``airport_1.jpg`` -> ``airport``; ``00815.jpg`` has none), or UCM's number
    """
    path = Path(json_file)
    content = read_karpathy(path)
    source = take(content, "dataset", str, str(path), "") or path.stem
    label_of = choose_labels(labels)
    places = ((entry, f"{path}, entry {number} of 'images'") for number, entry in enumerate(content["images"], 1))
    records = [_karpathy_record(entry, where, str(images), label_of, source) for entry, where in places]
    if labels is None:
        label_by_number(records)
    return keep_split(records, split, path)


def read_karpathy(path: Path) -> dict[str, Any]:
    """Returns the content of a Karpathy JSON. Raises ValueError, which names the file, if it is not one."""
    meaning = "not a Karpathy JSON, which is an object with a list 'images'"
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; so it is {meaning}") from error
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise ValueError(f"{path} is {meaning}")
    return content


def annotated_label(entry: dict[str, Any], where: str) -> str | None:
    """Returns the scene that an entry names by ``label``, else by ``scene``; it may be a number.

    Raises ValueError for a label of another kind, such as a list. A ``scene`` of another kind is something else, and is
    ignored.
    """
    label, scene = entry.get("label"), entry.get("scene")
    if label in (None, "") and isinstance(scene, str | int) and not isinstance(scene, bool):
        return str(scene)
    if isinstance(label, int) and not isinstance(label, bool):
        return str(label)
    return take(entry, "label", str, where, None)


def _karpathy_record(entry: Any, where: str, images: str, label_of: Callable, source: str) -> Record:
    name = (Path(take(entry, "filepath", str, where, "")) / take(entry, "filename", str, where)).as_posix()
    rows = enumerate(take(entry, "sentences", list, where, []), 1)
    texts = [text for number, row in rows if (text := _sentence(row, f"{where}, sentence {number}"))]
    label = label_of(name, annotated_label(entry, where))
    split, url = (take(entry, field, str, where, None) for field in ("split", "url"))
    return Record(sample_key(name), ImageFile(images, name), texts, label, split, source, url)


def _sentence(row: Any, where: str) -> str:
    """Returns the caption: a text, the ``raw`` of an object, or its ``tokens``. It may be blank. Raises ValueError."""
    if isinstance(row, str):
        return row.strip()
    raw = take(row, "raw", str, where, None)
    if raw or "tokens" not in row:
        return take(row, "raw", str, where).strip()
    return " ".join(check(word, str, f"{where}: a token") for word in take(row, "tokens", list, where, [])).strip()


def precomp(
    folder: str | Path, images: str | Path, split: str | None = None, labels: str | Path | None = None
) -> list[Record]:
    """Reads a folder of ``SPLIT_caps.txt`` and ``SPLIT_filename.txt``.

    A file name has one line for all its captions (RSICD, RSITMD: train), or one line per caption (test). The numbers of
    lines tell which. Blank captions (RSITMD has twenty) are left out, but their lines count.

    Args:
        folder: folder of the text files
        images: folder of the images; file names are relative to it
        split: the first part of the text files' names; None takes all splits
        labels: as in ``karpathy``

    Raises:
        FileNotFoundError: the files do not exist; it lists the splits that do
        ValueError: the numbers of lines do not match; it has both numbers
    """
    root = Path(folder)
    found = sorted(m["split"] for path in root.glob("*_caps.txt") if (m := SET_NAME.fullmatch(path.name)))
    if not found or (split is not None and split not in found):
        wanted = f"{split or 'SPLIT'}_caps.txt"
        raise FileNotFoundError(f"--precomp {root}: no {wanted} there; splits found: {', '.join(found) or 'none'}")
    label_of = choose_labels(labels)
    records: list[Record] = []
    for name in [split] if split is not None else found:
        records += _precomp_split(root, name, str(images), label_of)
    return records


def _precomp_split(root: Path, split: str, images: str, label_of: Callable) -> list[Record]:
    captions, names = read_lines(root / f"{split}_caps.txt"), read_lines(root / f"{split}_filename.txt")
    each, rest = divmod(len(captions), len(names)) if names else (0, 1)
    if rest or not each:
        raise ValueError(
            f"{root}: {split}_caps.txt has {len(captions)} lines and {split}_filename.txt {len(names)}: a file "
            "needs one line per caption, or one line for the same number of captions each"
        )
    records: dict[str, Record] = {}
    for line, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"{root / f'{split}_filename.txt'}, line {line + 1}: no file name")
        name = name.strip()
        if name not in records:
            key = sample_key(name)
            records[name] = Record(key, ImageFile(images, name), [], label_of(name), split, source_name(root))
        texts = (text.strip() for text in captions[line * each : line * each + each])
        records[name].captions += [text for text in texts if text]
    return list(records.values())


def source_name(folder: Path) -> str:
    """Returns ``rsitmd`` for ``rsitmd_precomp``."""
    return folder.resolve().name.removesuffix("_precomp")


def read_lines(path: Path) -> list[str]:
    """Returns the lines of a text file, split at line feeds only, because a caption may have other separators."""
    text = (
        read_regular(path, MAX_LINES).decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    )
    return text.removesuffix("\n").split("\n") if text else []


def choose_labels(labels: str | Path | None) -> Callable[..., str | None]:
    """Returns the function that labels a file name: by a CSV, by annotation or stem (None), or not at all ("none")."""
    if labels == "none":
        return _no_label
    return make_labeller(label_table(labels) if labels else {})


def _no_label(name: str, annotated: str | None = None) -> str | None:
    return None


def label_by_number(records: Sequence[Record]) -> None:
    """Labels UCM-Captions by number, if the keys are 1 ... 2100 without labels and the captions agree.

    File N shows scene (N - 1) // 100 in alphabetical order. The function relies on this order only if most captions of
    each scene in UCM_WORDS use the word of the scene.
    """
    numbers = {int(record.key): record for record in records if record.label is None and record.key.isdecimal()}
    if len(numbers) != len(records) or sorted(numbers) != list(range(1, 100 * len(UCM_SCENES) + 1)):
        return
    for place, scene in enumerate(UCM_SCENES):
        block = [numbers[number] for number in range(100 * place + 1, 100 * place + 101)]
        named = sum(any(UCM_WORDS.get(scene, "") in text.lower() for text in record.captions) for record in block)
        if named <= 50:
            return
    for number, record in numbers.items():
        record.label = UCM_SCENES[(number - 1) // 100]
