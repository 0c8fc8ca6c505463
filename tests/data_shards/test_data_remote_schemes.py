"""Shards of s3://, gs:// and hf:// are requested with credentials, which no other host gets."""

from __future__ import annotations

import hashlib
import hmac
import shutil
import sys
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlsplit

import pytest
from remote_data import SECRET, TAR, open_shards, sample_of
from remote_server import Behaviour, RemoteServer, serving

from priorclip.data_shards import ShardSet
from priorclip.data_shards.format.sample import BadSample

pytestmark = pytest.mark.usefixtures("quick_retries")


def signature_checker(secret: str):
    """Of a pre-signed S3 request, by AWS's description of Signature Version 4; not by the code that signs."""

    def check(target: str, headers: dict[str, str]) -> int | None:
        parts = urlsplit(target)
        fields = dict(parse_qsl(parts.query, keep_blank_values=True))
        given = fields.pop("X-Amz-Signature", "")
        if not given:
            return 403
        query = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(fields.items()))
        signed = fields["X-Amz-SignedHeaders"].split(";")
        lines = "".join(f"{name}:{headers[name].strip()}\n" for name in signed)
        request = "\n".join(("GET", parts.path, query, lines, ";".join(signed), "UNSIGNED-PAYLOAD"))
        _, day, region, service, last = fields["X-Amz-Credential"].split("/")
        text = "\n".join(
            (
                "AWS4-HMAC-SHA256",
                fields["X-Amz-Date"],
                "/".join((day, region, service, last)),
                hashlib.sha256(request.encode()).hexdigest(),
            )
        )
        key = f"AWS4{secret}".encode()
        for piece in (day, region, service, last):
            key = hmac.new(key, piece.encode(), hashlib.sha256).digest()
        return None if hmac.new(key, text.encode(), hashlib.sha256).hexdigest() == given else 403

    return check


def test_s3_requests_are_signed_with_the_users_credentials(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    keys = tmp_path / "credentials"
    keys.write_text("[lab]\naws_access_key_id = me\naws_secret_access_key = right\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.behaviour = Behaviour(check=signature_checker("right"))
    with pytest.raises(OSError, match=r"403.*credentials"):  # without a profile: unsigned
        open_shards(f"s3://train/{TAR}", tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    shards = open_shards("s3://train/", tmp_path)
    assert sample_of(shards, 27) == sample_of(ShardSet(str(packed)), 27)
    assert shards.name(27)[0] == f"s3://train/{TAR}"
    server.behaviour.check = signature_checker("changed")
    with pytest.raises(BadSample, match="403"):
        shards.read(0)


def test_the_hub_and_google_are_asked_at_their_addresses(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed, server.folder / "datasets/me/scenes/resolve/v1/train")
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    expected = sample_of(ShardSet(str(packed)), 27)
    assert sample_of(open_shards("hf://datasets/me/scenes@v1/train/", tmp_path), 27) == expected
    assert server.of("resolve")[0].headers["authorization"] == f"Bearer hf_{SECRET}"
    assert sample_of(open_shards("gs://train/", tmp_path / "b"), 27) == expected
    with pytest.raises(OSError, match="OWNER/NAME"):
        open_shards("hf://datasets/me/", tmp_path)
    with pytest.raises(ValueError, match="ftp"):
        open_shards("ftp://host/a.tar", tmp_path)


def test_a_token_does_not_follow_a_redirection_to_another_host(
    server: RemoteServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    with serving(hub) as front:
        place = f"{server.url.replace('127.0.0.1', 'localhost')}/train/{TAR}"
        front.behaviour = Behaviour(statuses=[(302, {"Location": place})] * 99)
        url = front.url.replace("http://", f"http://me:{SECRET}@") + f"/{TAR}"
        shards = open_shards(url, tmp_path, cache_limit=0)
        assert sample_of(shards, 4) == sample_of(ShardSet(str(packed)), 24)
        assert all("authorization" in row.headers for row in front.of(TAR))
        assert all("authorization" not in row.headers for row in server.of(TAR))
        assert len(front.of(TAR)) == 1  # later requests go straight to where the first was sent


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(OSError, match=r"pip install 'priorclip-pretraining\[s3\]'"):
        open_shards("s3://bucket/a.tar", tmp_path)
