"""An index of somebody else runs no command, connects nowhere and reads no file outside the allowed folders."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import fuzz, replaced
from small_galleries import TestSet

from priorclip.common.safe_paths import UnsafePath
from priorclip.data_shards.format.sample import BadSample
from priorclip.retrieval import EmbeddingIndex, Encoder, Searcher, build_index, create_server
from priorclip.retrieval.__main__ import main
from priorclip.retrieval.commands import IndexConfig
from priorclip.retrieval.embedding_index import FORMAT, check_entry, read_about


@pytest.fixture(scope="module")
def built(test_set: TestSet, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingIndex:
    """An index beside its images: both are in one folder."""
    bundle = tmp_path_factory.mktemp("bundle")
    shutil.copytree(test_set.images, bundle / "images")
    shutil.copytree(test_set.shards, bundle / "shards")
    config = IndexConfig(
        model=str(test_set.export), data=str(test_set.json), images=str(bundle / "images"),
        output=str(bundle / "index"), device="cpu", limit=3,
    )  # fmt: skip
    return build_index(config)


@pytest.fixture
def bundle(built: EmbeddingIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the index and its images. The working directory is another folder."""
    shutil.copytree(built.folder.parent, tmp_path / "bundle")
    lines = tmp_path / "bundle" / "index" / "images.jsonl"
    lines.write_text(lines.read_text().replace(str(built.folder.parent), str(tmp_path / "bundle")))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "bundle"


def change(bundle: Path, **fields: Any) -> Path:
    """Writes an entry of the attacker over the first image, and returns the index."""
    path = bundle / "index" / "images.jsonl"
    lines = path.read_text().splitlines()
    lines[0] = json.dumps({"key": "harbour/harbour_0", "label": None, **fields})
    path.write_text("".join(f"{line}\n" for line in lines))
    return bundle / "index"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        yield server


def hostile_names(bundle: Path, port: int) -> dict[str, str]:
    secret = bundle.parent / "secret.png"
    shutil.copy(next((bundle / "images").rglob("*.png")), secret)
    shutil.copy(next((bundle / "shards").glob("*.tar")), bundle.parent / "secret.tar")
    (bundle / "link.png").symlink_to(secret)
    (bundle / "link.tar").symlink_to(bundle.parent / "secret.tar")
    (bundle / "folder").symlink_to(bundle.parent)
    os.mkfifo(bundle / "fifo")
    shutil.copytree(bundle / "shards", bundle / "fifo-index")
    for name in ("test-000000.tar.idx", "manifest.json"):
        (bundle / "fifo-index" / name).unlink()
        os.mkfifo(bundle / "fifo-index" / name)
    proof = bundle / "EXECUTED"
    return {
        "command": f"pipe:touch {proof}; cat {bundle}/shards/test-000000.tar",
        "command in capitals": f"PIPE:touch {proof}",
        "command below a folder": f"{bundle}/pipe:touch {proof}",
        "http": f"http://127.0.0.1:{port}/a.tar",
        "https": f"https://127.0.0.1:{port}/a.tar",
        "s3": "s3://bucket/a.tar",
        "hub": "hf://datasets/x/y/a.tar",
        "file URL": f"file://{secret}",
        "absolute path": str(secret),
        "system file": "/etc/passwd",
        "parent": f"{bundle}/../secret.png",
        "relative parent": "../../secret.png",
        "link": str(bundle / "link.png"),
        "linked tar": str(bundle / "link.tar"),
        "linked folder": str(bundle / "folder" / "secret.png"),
        "named pipe": str(bundle / "fifo"),
        "named pipe as index": str(bundle / "fifo-index" / "test-000000.tar"),
        "device": "/dev/zero",
        "process": f"/proc/{os.getpid()}/environ",
        "wildcard": f"{bundle}/../*.tar",
        "braces": f"{bundle}/{{../secret,x}}.tar",
        "folder": str(bundle / "shards"),
        "NUL": f"{bundle}/a\0.tar",
        "empty": "",
        "long": "a" * 5000,
        "home": "~/.ssh/id_rsa",
    }


NAMES = [
    "command", "command in capitals", "command below a folder", "http", "https", "s3", "hub", "file URL",
    "absolute path", "system file", "parent", "relative parent", "link", "linked tar", "linked folder", "named pipe",
    "named pipe as index", "device", "process", "wildcard", "braces", "folder", "NUL", "empty", "long", "home",
]  # fmt: skip


@pytest.mark.parametrize("field", ["path", "shard"])
@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_are_refused(bundle: Path, listener: socket.socket, name: str, field: str) -> None:
    text = hostile_names(bundle, listener.getsockname()[1])[name]
    if (name, field) == ("named pipe as index", "path"):
        return  # as an image file this is a plain tar
    index = EmbeddingIndex.load(change(bundle, **{field: text}, **({"sample": 0} if field == "shard" else {})))
    with pytest.raises((UnsafePath, BadSample, OSError)):
        index.read_image(0)
    assert index.read_image(1), "the other images are shown"
    assert not list(bundle.parent.rglob("EXECUTED"))
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.parametrize(
    "line",
    ["", "[]", "1", "null", "{", '{"key": 1, "label": null, "path": "a"}', '{"key": "a", "label": 2, "path": "a"}',
     '{"key": "a", "label": null, "path": ["a"]}', '{"key": "a", "label": null, "shard": "a.tar"}',
     '{"key": "a", "label": null, "shard": "a.tar", "sample": -1}',
     '{"key": "a", "label": null, "shard": "a", "sample": 1e99}',
     '{"key": "a", "label": null, "shard": "a.tar", "sample": ' + "9" * 4000 + "}",
     "[" * 60000, '{"key": "' + "a" * 70000],
)  # fmt: skip
def test_malformed_entries_are_refused(bundle: Path, line: str) -> None:
    path = bundle / "index" / "images.jsonl"
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]) + "\n")
    index = EmbeddingIndex.load(bundle / "index")
    with pytest.raises(ValueError, match=r"line 1.*: make the index again"):
        index.read_image(0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": 5},
        {"model_sha256": None},
        {"data": ["a"]},
        {"images": "many"},
        {"images": float("inf")},
        {"width": None},
    ],
)
def test_malformed_index_json_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    path = bundle / "index" / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"index\.json: '"):
        EmbeddingIndex.load(bundle / "index")


def test_images_elsewhere_need_the_option(bundle: Path, test_set: TestSet) -> None:
    """An index whose images are in another folder opens, and shows them after ``--data`` named the folder."""
    image = bundle.parent / "photos" / "a.png"
    image.parent.mkdir()
    shutil.copy(next((bundle / "images").rglob("*.png")), image)
    index = change(bundle, path=str(image))
    with pytest.raises(UnsafePath, match=f"allow it with --data {image.parent}"):
        EmbeddingIndex.load(index).read_image(0)
    for allowed in (image.parent, image):
        assert EmbeddingIndex.load(index, [str(allowed)]).read_image(0) == image.read_bytes()
    tar = bundle.parent / "photos" / "t.tar"
    shutil.copy(bundle / "shards" / "test-000000.tar", tar)
    index = change(bundle, shard=str(tar), sample=0)
    with pytest.raises(UnsafePath):
        EmbeddingIndex.load(index).read_image(0)
    for pattern in (str(tar.parent), f"{tar.parent}/{{t..t}}.tar", f"{tar.parent}/*.tar"):
        assert EmbeddingIndex.load(index, [pattern]).read_image(0)


def test_images_in_the_working_directory_need_no_option(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(bundle / "images", bundle.parent / "elsewhere" / "images")
    image = next((bundle.parent / "elsewhere" / "images").rglob("*.png"))
    assert EmbeddingIndex.load(change(bundle, path=str(image))).read_image(0) == image.read_bytes()
    monkeypatch.chdir("/")
    with pytest.raises(UnsafePath):
        EmbeddingIndex.load(change(bundle, path=str(image))).read_image(0)


@pytest.mark.parametrize(
    "name",
    ["openai/clip-vit-base-patch32", "package:os", "https://host/export", "pipe:id", "../../x", "/x/../y", "/nowhere"],
)
def test_model_of_an_index_is_a_local_folder(
    bundle: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    words = ["search", "--index", str(bundle / "index"), "--text", "a river", "--device", "cpu"]
    assert main(words) == 0
    about = json.loads((bundle / "index" / "index.json").read_text())
    (bundle / "index" / "index.json").write_text(json.dumps(about | {"model": name}))
    assert main(words) == 2
    assert name in capsys.readouterr().err
    assert main([*words, "--model", str(test_set.export)]) == 0


def test_search_prints_no_control_characters(
    bundle: Path, test_set: TestSet, capsys: pytest.CaptureFixture[str]
) -> None:
    change(bundle, key="\x1b]0;pwned\x07", label="\x1b[31m", path="/x\n\x1b[2J")
    words = ["search", "--index", str(bundle / "index"), "--model", str(test_set.export), "--device", "cpu"]
    assert main([*words, "--text", "a river"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert len(printed.splitlines()) == 4


def test_server_refuses_and_says_so_once(bundle: Path, test_set: TestSet, caplog: pytest.LogCaptureFixture) -> None:
    index = change(bundle, shard=f"pipe:touch {bundle}/EXECUTED", sample=0)
    served = create_server(Searcher(EmbeddingIndex.load(index), Encoder.load(test_set.export, "cpu")))
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    try:
        with caplog.at_level(logging.WARNING):
            answers = []
            for path in ("/image/0", "/image/0?side=64", "/belief/0", "/image/1", "/search?image=0"):
                connection = http.client.HTTPConnection(*served.server_address[:2], timeout=30)
                connection.request("GET", path)
                answers.append(connection.getresponse().status)
                connection.close()
    finally:
        served.shutdown()
        served.server_close()
        thread.join(10)
    assert answers == [403, 403, 403, 200, 200]
    assert len([record for record in caplog.records if "No such image is shown" in record.getMessage()]) == 1
    assert not (bundle / "EXECUTED").exists()


@fuzz
@given(draw=st.data())
def test_any_value_in_an_index_is_read_or_named(tmp_path: Path, draw: st.DataObject) -> None:
    """index.json, and a line of images.jsonl."""
    about = {"format": FORMAT, "version": 1, "images": 2, "width": 3, "model": "m", "model_sha256": "0", "data": "d"}
    entry = draw.draw(st.sampled_from([{"path": "a.png"}, {"shard": "a.tar", "sample": 3}]))
    (tmp_path / "index.json").write_text(json.dumps(replaced(draw, about)))
    line = json.dumps(replaced(draw, {"key": "a", "label": None, **entry})).encode()
    for place, read in (
        (f"{tmp_path}/index.json", lambda: read_about(tmp_path)),
        ("line 1", lambda: check_entry(line, "line 1")),
    ):
        try:
            found = read()
        except ValueError as error:
            said = str(error)
            assert said.startswith(place)
        else:
            assert all(isinstance(found[name], str) for name in ("model", "key", "path", "shard") if name in found)
            assert all(0 <= found[name] <= 1 << 40 for name in ("images", "width", "sample") if name in found)


@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/dev/zero"), os.mkfifo])
def test_an_index_json_without_end_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "index.json")
    with pytest.raises(ValueError, match=r"index\.json is no regular file"):
        read_about(tmp_path)
