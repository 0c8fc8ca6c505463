"""Names and hashes in a manifest of somebody else reach no file outside its folder, no host and no command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from remote_server import serving
from small_data import encoded, picture, write_tar

from priorclip.data_shards import ShardSet, load_tokenizer
from priorclip.data_shards.find_shards import find_shards
from priorclip.data_shards.format.manifest import Manifest
from priorclip.data_shards.format.shard_index import Layout

HASH = "0" * 64
# FOLDER stands for the folder of the test, PROOF for a file that only an executed command makes.
EVIL = ["../outside.tar", "sub/../../outside.tar", "FOLDER/outside.tar", "//FOLDER/outside.tar", "", ".", "..",
        "a\0b.tar", "http://127.0.0.1:9/a.tar", "s3://bucket/a.tar", "hf://datasets/a/b/c.tar", "file://FOLDER/outside.tar",
        "pipe:touch PROOF; cat FOLDER/outside.tar", "./pipe:touch PROOF", "PIPE:touch PROOF", "C:\\a.tar",
        "..\\outside.tar", ["a.tar"], None, 7]  # fmt: skip
EVIL_HASHES = [
    "../../../outside",
    "../" * 12 + "tmp/x",
    "/etc",
    HASH[1:],
    HASH + "0",
    HASH.replace("0", "G"),
    None,
    7,
    ["0"],
]


@pytest.fixture
def folder(packed: Path, tmp_path: Path) -> Path:
    write_tar(tmp_path / "outside.tar", {"a.jpg": encoded(picture(1)), "a.txt": b"secret"})
    shutil.copytree(packed, tmp_path / "served" / "train")
    return tmp_path / "served" / "train"


def change(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    edit(content["shards"])
    path.write_text(json.dumps(content))


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("name", EVIL, ids=repr)
def test_evil_shard_name_is_refused(folder: Path, tmp_path: Path, name: object, remote: bool) -> None:
    proof = tmp_path / "proof"
    if isinstance(name, str):
        name = name.replace("FOLDER", str(tmp_path)).replace("PROOF", str(proof))
    change(folder, lambda shards: shards.append({**shards[0], "name": name}))
    before = files_of(tmp_path)
    with serving(folder.parent) as server:
        spec = f"{server.url}/train/" if remote else str(folder)
        named = f"{spec}manifest.json" if remote else str(folder / "manifest.json")
        for open_it in (
            lambda: ShardSet(spec, cache=str(tmp_path / "cache")),
            lambda: find_shards(spec, str(tmp_path / "cache")),
        ):
            with pytest.raises(ValueError, match=r"the file name .* is refused because") as raised:
                open_it()
            assert str(raised.value).startswith(named)
        assert {asked.path for asked in server.asked} <= {"/train/manifest.json"}
    assert not proof.exists()
    assert {
        path: data for path, data in files_of(tmp_path).items() if not path.is_relative_to(tmp_path / "cache")
    } == before


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("key", ["sha256", "index_sha256"])
@pytest.mark.parametrize("digest", EVIL_HASHES, ids=repr)
def test_evil_hash_makes_no_path(folder: Path, tmp_path: Path, key: str, digest: object, remote: bool) -> None:
    change(folder, lambda shards: shards[0].update({key: digest}))
    before = files_of(tmp_path)
    with serving(folder.parent) as server, pytest.raises(ValueError, match="is not 64 hex digits"):
        ShardSet(f"{server.url}/train/" if remote else str(folder), cache=str(tmp_path / "cache"))
    assert {
        path: data for path, data in files_of(tmp_path).items() if not path.is_relative_to(tmp_path / "cache")
    } == before


@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
def test_shards_in_subfolders_are_read(folder: Path, tmp_path: Path, remote: bool) -> None:
    (folder / "sub" / "deeper").mkdir(parents=True)
    for name in ("train-000001.tar", "train-000001.tar.idx"):
        (folder / name).rename(folder / "sub" / "deeper" / name)
    whole = len(ShardSet(str(folder / "train-*.tar"))) + 10
    change(folder, lambda shards: shards[1].update(name="sub/deeper/train-000001.tar"))
    with serving(folder.parent) as server:
        shards = ShardSet(f"{server.url}/train/" if remote else str(folder), cache=str(tmp_path / "cache"))
        assert len(shards) == whole
        assert shards.read(10).key == "area/00010"


def test_a_path_is_taken_literally(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Braces, wildcards, ``~`` and schemes have a meaning on the command line only."""
    members = {"a.jpg": encoded(picture(1)), "a.txt": b"x"}
    monkeypatch.chdir(tmp_path)
    for name in ("{a,b}.tar", "*.tar", "~x.tar", "pipe:touch proof"):
        write_tar(Path(name), members)
        assert len(ShardSet([Path(name)])) == 1
    with pytest.raises(FileNotFoundError):
        ShardSet([Path("{.,}./outside.tar")])
    assert not Path("proof").exists()
    assert len(ShardSet([tmp_path])) == 3  # the tars


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "data-shards", "shards": ' + "[" * 100_000])
def test_nested_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json is not JSON"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"samples": 1e400}, {"samples": "x"}, {"members": -1}, {"extensions": [["jpg"]]}, {"extensions": 3}],
    ids=repr,
)
def test_evil_first_line_of_an_index_is_an_error(change: dict) -> None:
    line = {
        "format": "data-shards-index",
        "version": 1,
        "samples": 1,
        "members": 2,
        "key_bytes": 3,
        "extensions": ["jpg"],
    }
    with pytest.raises(ValueError, match=r"a\.tar\.idx is damaged or not a shard index"):
        Layout.parse(json.dumps({**line, "hashed": True, **change}).encode(), Path("a.tar.idx"))
    with pytest.raises(ValueError, match=r"a\.tar\.idx is damaged or not a shard index"):
        Layout.parse(b"[" * 100_000, Path("a.tar.idx"))


def test_code_of_a_tokenizer_folder_does_not_run(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder, proof = tmp_path / "tokenizer", tmp_path / "proof"
    shutil.copytree(tokenizer_folder, folder)
    (folder / "evil.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass Evil: ...\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"})
    )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_tokenizer(str(folder), 12)
    assert not proof.exists()
