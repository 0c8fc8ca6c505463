"""What stored embeddings depend on, as hashes: the weights and the settings of a model, and the samples of a gallery.

model_hash(Path("runs/demo/export"))                "9f2c..."  of the weights alone; an index names it
model_digest(Path("runs/demo/export"), "fp32")      "51be..."  of weights, settings, tokenizer, and the words
data_digest(gallery, "captions")                    "07aa..."  of samples, captions, scenes and image files
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from priorclip.common.files import sha256_of
from priorclip.data_shards.remote.shard_files import LocalFile
from priorclip.data_shards.shards import ShardSet
from priorclip.retrieval.gallery import Gallery

SETTINGS = ("*.json", "*.txt", "*.model")  # configuration, and the files of tokenizers


def model_hash(folder: Path) -> str:
    """Returns the SHA-256 of an export folder's weights. Embeddings of other weights cannot be compared.

    A process reads a file once, unless it changes.
    """
    path = folder.resolve() / "model.safetensors"
    state = path.stat()
    return hash_of_state(path, state.st_ino, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)
def hash_of_state(path: Path, *state: int) -> str:
    """Returns the SHA-256 of a file that has this state."""
    return sha256_of(path)


def model_digest(folder: Path, words: str) -> str:
    """Returns a hash of an export folder's weights, configuration and tokenizer, and of further words."""
    found = hashlib.sha256(f"{words} {model_hash(folder)}".encode())
    for path in sorted(path for kind in SETTINGS for path in folder.glob(kind)):
        found.update(path.read_bytes())
    return found.hexdigest()


def list_captions(gallery: Gallery, caption_field: str | None) -> tuple[list[str], np.ndarray]:
    """Returns all captions, image by image, and the sample of each, int64 (T,)."""
    captions: list[str] = []
    owners: list[int] = []
    for sample in range(len(gallery.source)) if caption_field else ():
        texts = gallery.source.captions(sample, caption_field or "captions")
        captions += texts
        owners += [sample] * len(texts)
    return captions, np.array(owners, dtype=np.int64)


def data_digest(gallery: Gallery, caption_field: str | None) -> str:
    """Returns a hash of the samples, their captions and scenes, and the size and time of the image files."""
    found = hashlib.sha256(f"{gallery.source.fingerprint} {len(gallery.source)} {caption_field}".encode())
    found.update(np.asarray(gallery.places, dtype=np.int64).tobytes())
    for line in (*describe_files(gallery), *list_captions(gallery, caption_field)[0]):
        found.update(f"{line}\0".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def describe_files(gallery: Gallery) -> Sequence[str]:
    """Returns name, size and time of each file with images, and the scene if the file does not hold it.

    Remote shards have only their name here, because the fingerprint covers them.
    """
    if isinstance(gallery.origin, ShardSet):
        paths = [file.path if isinstance(file, LocalFile) else None for file in gallery.origin.files]
    else:
        records = [gallery.origin.records[place] for place in gallery.places]
        return [f"{file_state(record.path)} {record.label}" for record in records]
    return [file_state(path) for path in paths]


def file_state(path: Path | None) -> str:
    if path is None or not path.is_file():
        return str(path)
    status = path.stat()
    return f"{path.name} {status.st_size} {status.st_mtime_ns}"
