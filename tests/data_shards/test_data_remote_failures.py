"""A server that fails, stops or lies costs samples, not the run, and no secret leaves a request."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from pathlib import Path

import pytest
from remote_data import SECRET, TAR, open_shards, sample_of
from remote_server import Behaviour, RemoteServer
from small_data import rows

from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.remote import http_ranges, shard_files, urls
from priorclip.data_shards.remote.http_headers import retry_seconds
from priorclip.data_shards.remote.http_ranges import Version
from priorclip.data_shards.remote.shard_files import Access, RemoteFile

pytestmark = pytest.mark.usefixtures("quick_retries")


def test_a_body_cut_in_the_middle_goes_on_where_it_stopped(server: RemoteServer, tmp_path: Path) -> None:
    data = (server.folder / "train" / TAR).read_bytes()
    file = RemoteFile(f"{server.url}/train/{TAR}", Access.from_options(str(tmp_path), 0, 60))
    assert file.size == len(data)
    server.behaviour = Behaviour(drop_every=2, drop_after=3000)
    server.count = 1
    assert file.pread(1000, 20_000) == data[1000:21_000]
    first, second = server.of(TAR)[1:]
    assert (first.range, first.sent) == ("bytes=1000-20999", 3000)
    assert (second.range, second.sent) == ("bytes=4000-20999", 17_000)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_retried_after_the_pause_it_names(server: RemoteServer, tmp_path: Path, status: int) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path)
    server.behaviour = Behaviour(statuses=[(status, {"Retry-After": "1"}), (status, {})])
    started = time.monotonic()
    assert shards.read(3).image
    assert time.monotonic() - started >= 1
    assert [row.status for row in server.of(r"\.tar$")][-3:-1] == [status, status]


def test_retry_after_as_a_date_and_its_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(http_ranges.time, "sleep", slept.append)
    http_ranges._pause_or_give_up("http://a/b", 1, http_ranges.Transient("x", 1e9))
    assert slept == [http_ranges.LONGEST_PAUSE]
    assert retry_seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    assert (retry_seconds(time.strftime("%a, %d %b 2099 07:28:00 GMT")) or 0) > 1000
    assert retry_seconds("soon") is None


@pytest.mark.parametrize(("status", "reason"), [(403, "remote cannot be read"), (404, "shard is missing"), (410, "")])
def test_a_final_refusal_is_not_repeated_and_counts_as_a_bad_sample(
    server: RemoteServer, tmp_path: Path, status: int, reason: str
) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path)
    before = len(server.of(r"\.tar$"))
    server.behaviour = Behaviour(statuses=[(status, {})])
    with pytest.raises(BadSample, match=reason or "shard is missing"):
        shards.read(3)
    assert len(server.of(r"\.tar$")) == before + 1
    assert shards.read(3).image  # the error leaves no trace


def test_a_server_that_goes_away_costs_samples_and_not_the_run(
    server: RemoteServer, tmp_path: Path, tokenizer_folder: Path
) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, cache_limit=0)
    server.behaviour = Behaviour(statuses=[(503, {})] * 60)
    config = DataConfig("", image_size=24, workers=0, block_size=4, window_blocks=3, max_bad_share=1.0)
    stream = ShardStream(shards, None, config, global_batch=8, seed=5)
    batches = list(itertools.islice(stream, 5))
    assert [len(batch["image_ids"]) for batch in batches] == [8] * 5
    assert 1 <= stream.skipped["remote cannot be read"] <= 60 - http_ranges.ATTEMPTS  # after that, one attempt each
    server.shutdown()
    server.server_close()
    http_ranges._reset_after_fork()  # otherwise its threads answer on open connections
    with pytest.raises(BadSample, match=r"remote cannot be read.*no connection"):
        shards.read(3)
    with pytest.raises(OSError, match="Is the address right"):
        open_shards(f"{server.url}/train/{TAR}", tmp_path / "other")


def test_a_server_that_trickles_is_given_up(server: RemoteServer, tmp_path: Path, monkeypatch) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, timeout=0.3)
    shards.key(3)
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 2)
    server.behaviour = Behaviour(trickle=0.02)
    started = time.monotonic()
    with pytest.raises(BadSample, match="timeout"):
        shards.read(3)
    assert time.monotonic() - started < 60  # the whole body would take minutes
    server.behaviour = Behaviour(latency=1.0)
    with pytest.raises(BadSample, match="timeout"):
        shards.read(3)


def test_a_server_without_ranges_is_fetched_whole_once(
    server: RemoteServer, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shard_files._warned_hosts.clear()
    server.behaviour = Behaviour(ranges=False, drop_every=4, drop_after=2000)
    spec = [f"{server.url}/train/train-00000{number}.tar" for number in (1, 2)]
    for limit in (0, "1MB"):
        shards = open_shards(spec, tmp_path, cache_limit=limit)
        local = ShardSet(str(packed))
        assert [sample_of(shards, i) for i in range(20)] == [sample_of(local, i + 10) for i in range(20)]
    assert caplog.text.count("does not support range requests") == 1
    whole = [row for row in server.of(r"\.tar$") if row.range is None]
    assert 2 <= len(whole) <= 4  # each once, plus the dropped ones
    files = sorted((tmp_path / "cache" / "whole").glob("*-whole"))
    assert sorted(path.read_bytes() for path in files) == sorted(
        (packed / f"train-00000{number}.tar").read_bytes() for number in (1, 2)
    )


@pytest.mark.parametrize("limit", [0, "1MB"])
def test_a_shard_that_changes_under_the_run_is_bad_data(server: RemoteServer, tmp_path: Path, limit: int | str) -> None:
    shards = open_shards(f"{server.url}/train/", tmp_path, cache_limit=limit)
    shards.read(20)
    path = server.folder / "train" / TAR
    data = bytearray(path.read_bytes())
    data[-2000] ^= 255
    path.write_bytes(data)
    with pytest.raises(BadSample, match="shard has changed"):
        shards.read(29)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadSample, match="shard has changed"):
        shards.read(28)
    fresh = open_shards(f"{server.url}/train/", tmp_path, cache_limit=limit)  # shorter than in its manifest
    with pytest.raises(BadSample, match="its manifest says"):
        fresh.read(20)
    assert fresh.read(1).image


def test_two_backends_with_their_own_etags_are_one_file() -> None:
    one, other = Version(9, '"a"', "Mon"), Version(9, '"b"', "Mon")
    assert one.same(other)
    assert not one.same(dataclasses.replace(other, modified="Tue"))
    assert not Version(9, '"a"').same(Version(9, '"b"'))
    assert not one.same(dataclasses.replace(one, size=8))


def test_no_secret_leaves_the_request(
    server: RemoteServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(http_ranges, "ATTEMPTS", 2)
    url = server.url.replace("http://", f"http://me:{SECRET}@") + f"/train/{TAR}?part=1&X-Amz-Signature={SECRET}"
    shards = open_shards(url, tmp_path)
    assert server.of(TAR)[0].headers["authorization"].startswith("Basic ")
    book = tmp_path / "quarantine.jsonl"
    config = DataConfig("", image_size=24, workers=0, max_bad_share=1.0, quarantine=str(book))
    server.behaviour = Behaviour(statuses=[(503, {}), (403, {}), (404, {})])
    stream = ShardStream(shards, None, config, global_batch=2)
    next(iter(stream))
    assert rows(book)
    texts = [caplog.text, book.read_text(), *map(str, (tmp_path / "cache").rglob("*"))]
    texts += [str(shards.files[0]), shards.files[0].address, str(shards.spec)]
    server.behaviour = Behaviour(statuses=[(404, {})], only="train")
    with pytest.raises(OSError) as error:
        open_shards(url.replace(TAR, "absent.tar"), tmp_path)
    for text in (*texts, str(error.value)):
        assert SECRET not in text
    assert urls.unsigned_url(url) == f"{server.url}/train/{TAR}?part=1"


def test_an_unknown_field_of_a_query_tells_files_apart_and_is_not_shown() -> None:
    one, other = (f"https://host/a.tar?jwt={value}" for value in (SECRET, SECRET[::-1]))
    assert urls.unsigned_url(one) != urls.unsigned_url(other)
    assert urls.unsigned_url(one + "&X-Goog-Signature=a") == urls.unsigned_url(one + "&X-Goog-Signature=b")
    assert SECRET not in urls.unsigned_url(one) + urls.unsigned_url(f"https://host/a;id={SECRET}/b.tar?{SECRET}")


@pytest.mark.parametrize("url", [f"https://me:a/{SECRET}@host/a.tar", f"https://{SECRET}:x#y@host/a.tar"])
def test_a_password_that_cuts_the_host_short_is_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="%2F") as error:
        open_shards(url, tmp_path)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("command", [f"curl -u me:{SECRET} x", f"gpg --passphrase {SECRET}", f"TOKEN={SECRET} cat x"])
def test_neither_the_copy_nor_the_messages_of_a_pipe_have_its_secrets(command: str) -> None:
    assert SECRET not in urls.public_url(f"pipe:{command}") + urls.safe_file_name(f"pipe:{command}")
    assert urls.safe_file_name("pipe:ssh store cat /data/train-0000.tar") == "train-0000.tar"
