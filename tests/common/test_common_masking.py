"""No secret passes the masking, in whatever place of a URL or a command it stands."""

from __future__ import annotations

import io
import shlex
import threading

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from priorclip.common.masking import copy_masked, masked, masked_command, masked_values
from priorclip.common.url_secrets import HARMLESS

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SECRET = st.text(LETTERS + "-_.~+!$", min_size=8, max_size=30).map(lambda text: f"{text[:4]}Zq9{text[4:]}")
NAMES = st.text(LETTERS + "-_.", min_size=1, max_size=20).filter(lambda name: name.lower() not in HARMLESS)
SCHEMES = st.sampled_from(["http", "https", "s3", "gs", "hf", "ftp", "redis", "postgresql+psycopg", "socks5h"])
URLS = st.sampled_from([
    "SCHEME://me:SECRET@host/a.tar", "SCHEME://SECRET@host/a.tar", "SCHEME://SECRET:x@host:80", "SCHEME://:SECRET@host",
    "SCHEME://me:p@SECRET@host/a.tar", "SCHEME://me:a/SECRET@host/a", "SCHEME://me:a?b#SECRET@host/a?part=1",
    "SCHEME://host/a.tar?NAME=SECRET", "SCHEME://host/a.tar?part=1&NAME=SECRET&page=2", "SCHEME://host/a?SECRET",
    "SCHEME://host:8080/a.tar?NAME=x&NAME=SECRET#top", "SCHEME://host/a;NAME=SECRET/b.tar", "SCHEME://h/#NAME=SECRET",
    "ssh://git:SECRET@host/a", "/a.tar?NAME=SECRET", "GET /a.tar?part=1&NAME=SECRET HTTP/1.1",
    "SCHEME://host/a.tar?part=1%26NAME=SECRET", "me:SECRET@proxy:3128",
])  # fmt: skip
COMMANDS = st.sampled_from([
    "curl -u me:SECRET https://host/a.tar", "curl -ume:SECRET https://host/a.tar", "curl --user me:SECRET URL",
    "sshpass -p SECRET ssh store cat /a.tar", "sshpass -pSECRET ssh store cat /a.tar",
    "curl -H 'X-Anything: SECRET' https://host/a", 'curl --header "NAME: SECRET" https://host/a', "curl -b SECRET URL",
    "curl --proxy-user me:SECRET https://host/a", "curl --oauth2-bearer SECRET https://host/a",
])  # fmt: skip
PIPED = st.sampled_from([
    "wget --http-password=SECRET -qO- https://host/a", "wget --http-password SECRET -qO- https://host/a",
    "PGPASSWORD=SECRET psql -h db", "echo SECRET | sudo -S cat /a.tar", "cat /a | gpg --passphrase SECRET -d",
    "mysqldump -pSECRET db", "lftp -e SECRET", "rclone cat --anything SECRET x:", "gpg --batch <<< SECRET",
    "env X=SECRET cat /a.tar", "bash -c 'curl -u me:SECRET x'", "tool -q /a.tar --sas='SECRET'",
])  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(secret=SECRET, name=NAMES, scheme=SCHEMES, url=URLS, around=st.text("abc =:\n", max_size=8))
def test_every_place_for_a_secret_in_a_url_is_masked(secret, name, scheme, url, around) -> None:
    text = url.replace("SCHEME", scheme).replace("NAME", name).replace("SECRET", secret)
    for shown in (text, f"{around} {text} {around}", repr([text]), f'{{"{text}": 1}}', f"--shards={text}"):
        assert secret not in masked(shown)
        assert masked(masked(shown)) == masked(shown)
    values = yaml.safe_dump(masked_values({"shards": {text: 1.0, "data": 2}, "more": [{"shards": text}]}))
    assert secret not in values
    assert len(yaml.safe_load(values)["shards"]) == 2


@settings(max_examples=100, deadline=None)
@given(secret=SECRET, name=st.text(LETTERS, min_size=1, max_size=9), command=st.one_of(COMMANDS, PIPED))
def test_every_place_for_a_secret_in_a_pipe_is_masked(secret: str, name: str, command: str) -> None:
    assume(not secret.startswith("-"))
    pipe = "pipe:" + command.replace("NAME", name).replace("SECRET", secret)
    quoted = shlex.join(["pretrain", "--data.shards", pipe])
    for shown in (pipe, f"reading {pipe}", quoted, repr([pipe]), masked_command(["--data.shards", pipe])):
        assert secret not in masked(shown), shown
        assert masked(masked(shown)) == masked(shown)
    assert secret not in str(masked_values({pipe: 1}))


@settings(max_examples=60, deadline=None)
@given(secret=SECRET, command=COMMANDS)
def test_credentials_of_well_known_programs_are_masked_in_any_text(secret: str, command: str) -> None:
    assume(not secret.startswith("-"))
    text = command.replace("NAME", "X-Key").replace("SECRET", secret)
    if "-ume:" not in text and "-b " not in text:  # alone they may be anything
        assert secret not in masked(f"running {text}")
        assert secret not in masked_command(shlex.split(text))


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a.tar?part=1&page=2", "s3://rs5m/train-{0000..0031}.tar", "http://[::1]:8008/, Ctrl-C stops",
        "hf://datasets/org/name@v1/a.tar", "ssh://git@host/x", "pipe:ssh store cat /data/train-0000.tar",
        "pipe:aws s3 cp s3://b/a.tar - --profile lab --region eu-west-1", "pipe:curl -fsSL --retry 5 https://host/a.tar",
        "pipe:gzip -d -c /data/a.tar.gz | cat", "12:00:01 rank 0: step 10 of 20, token: 77", "nvcr.io/a:24@sha256:ab",
        "python -u train.py", "pin_memory: false", "docs/data.md#packing", "https://host/page#section",
    ],
)  # fmt: skip
def test_text_without_secrets_stays(text: str) -> None:
    assert masked(text) == text


@pytest.mark.parametrize("header", ["Authorization: Digest a=Zq9x, b=Zq9y", "Cookie: a=b; session=Zq9x",
                                    "Authorization: AWS4-HMAC-SHA256 Credential=AK/x, Signature=Zq9y"])  # fmt: skip
def test_headers_with_blanks_are_masked_to_their_end(header: str) -> None:
    for text in (header, f"> {header}\r\n> Host: h", str(dict([header.split(": ")]))):
        assert "Zq9" not in masked(text)
        assert masked(masked(text)) == masked(text)
    assert "Host: h" in masked(f"> {header}\r\n> Host: h")


def test_equal_keys_without_their_secrets_stay_apart() -> None:
    shards = {"https://a:1@host/x/": 1, "https://b:2@host/x/": 2}
    assert masked_values(shards) == {"https://***@host/x/": 1, "https://***@host/x/ (2)": 2}


class Pieces(io.BytesIO):
    """Gives its bytes in pieces of ten, as a pipe may."""

    def read1(self, size: int | None = -1, /) -> bytes:
        del size
        return self.read(10)


def test_a_private_key_that_comes_in_pieces_is_masked() -> None:
    key = "-----BEGIN RSA PRIVATE KEY-----\nZq9x\nZq9y\n-----END RSA PRIVATE KEY-----\n"
    sink = io.StringIO()
    thread: threading.Thread = copy_masked(Pieces(f"before\n{key}after\n".encode()), sink)
    thread.join(10)
    assert sink.getvalue() == "before\n***\nafter\n"
