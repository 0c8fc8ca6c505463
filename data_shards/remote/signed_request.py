"""Builds the GET request for a URL of any scheme, with credentials. All schemes become http(s) addresses.

    https://me:pw@host/a.tar       https://host/a.tar             Authorization: Basic ...
    s3://bucket/a.tar              pre-signed by obstore          AWS_* variables, AWS_ENDPOINT_URL, ~/.aws/credentials
    gs://bucket/a.tar              pre-signed by obstore          GOOGLE_SERVICE_ACCOUNT, GOOGLE_APPLICATION_CREDENTIALS
    hf://datasets/org/name/a.tar   huggingface.co/.../resolve/    HF_TOKEN or `hf auth login`, HF_ENDPOINT

Without credentials, s3:// and gs:// requests are not signed, which works for public buckets.
"""

from __future__ import annotations

import base64
import configparser
import os
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from priorclip.data_shards.remote.urls import public_url

SIGNED_FOR = timedelta(hours=1)
HUB_KINDS = {"datasets": "dataset", "models": "model", "spaces": "space"}


def build_request(url: str) -> tuple[str, dict[str, str]]:
    """Returns (address, headers) of a GET request. Raises OSError if a package or a part of the URL is missing."""
    scheme = urlsplit(url).scheme
    if scheme == "s3":
        return _s3(url), {}
    if scheme == "gs":
        return _gs(url), {}
    if scheme == "hf":
        return _hub(url)
    return _plain(url)


def _plain(url: str) -> tuple[str, dict[str, str]]:
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    headers = {"Authorization": "Basic " + base64.b64encode(unquote(user).encode()).decode()} if at else {}
    return urlunsplit(parts._replace(netloc=host, fragment="")), headers


def _s3(url: str) -> str:
    bucket, name = _bucket(url)
    account = _aws_account()
    if not account and not _aws_machine():  # a public bucket
        endpoint, region = _aws_endpoint(), _aws_region()
        base = f"{endpoint}/{bucket}" if endpoint else f"https://{bucket}.s3.{region}.amazonaws.com"
        return f"{base}/{quote(name)}"
    obstore = _obstore(url, "s3")
    options: dict = {"region": _aws_region(), **account}
    if endpoint := _aws_endpoint():
        options |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
        options["client_options"] = {"allow_http": True}
    return obstore.sign(obstore.store.S3Store(bucket, **options), "GET", name, SIGNED_FOR)


def _aws_endpoint() -> str | None:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return endpoint.rstrip("/") if endpoint else None


def _aws_region() -> str:
    named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    profile = os.environ.get("AWS_PROFILE", "default")
    section = profile if profile == "default" else f"profile {profile}"
    return named or str(_ini("AWS_CONFIG_FILE", "~/.aws/config").get(section, "region", fallback="us-east-1"))


def _aws_account() -> dict[str, str]:
    """Returns key, secret and session token from the environment, or from the profile; empty if there are none."""
    names = {"access_key_id": "", "secret_access_key": "", "session_token": ""}
    found = {name: os.environ.get(f"AWS_{name.upper()}", "") for name in names}
    if not found["access_key_id"]:
        profile = os.environ.get("AWS_PROFILE", "default")
        files = (
            (_ini("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials"), profile),
            (_ini("AWS_CONFIG_FILE", "~/.aws/config"), profile if profile == "default" else f"profile {profile}"),
        )
        for file, section in files:
            found = {name: file.get(section, f"aws_{name}", fallback="") for name in names}
            if found["access_key_id"]:
                break
    return {name: value for name, value in found.items() if value} if found["access_key_id"] else {}


def _aws_machine() -> bool:
    """Returns True if the environment names a role, for which obstore fetches credentials."""
    names = (
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_METADATA_ENDPOINT",
    )
    return any(os.environ.get(name) for name in names)


def _ini(variable: str, place: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(Path(os.environ.get(variable) or place).expanduser(), encoding="utf-8")
    return parser


def _gs(url: str) -> str:
    bucket, name = _bucket(url)
    names = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH", "GOOGLE_SERVICE_ACCOUNT_KEY")
    if any(os.environ.get(variable) for variable in (*names, "GOOGLE_APPLICATION_CREDENTIALS")):
        obstore = _obstore(url, "s3")
        return obstore.sign(obstore.store.GCSStore(bucket), "GET", name, SIGNED_FOR)
    host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    return f"{host if '://' in host else f'http://{host}'}/{bucket}/{quote(name)}"


def _hub(url: str) -> tuple[str, dict[str, str]]:
    from huggingface_hub import constants, get_token, hf_hub_url

    parts = url.removeprefix("hf://").split("/")
    kind = HUB_KINDS.get(parts[0], "model")
    parts = parts[1:] if parts[0] in HUB_KINDS else parts
    if len(parts) < 3 or not parts[-1]:
        raise OSError(f"{public_url(url)}: write hf://datasets/OWNER/NAME[@REVISION]/FILE.tar")
    name, _, revision = parts[1].partition("@")
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    address = hf_hub_url(
        f"{parts[0]}/{name}", "/".join(parts[2:]), repo_type=kind, revision=unquote(revision) or None, endpoint=endpoint
    )
    token = get_token()
    return address, {"Authorization": f"Bearer {token}"} if token else {}


def _bucket(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    name = parts.path.lstrip("/")
    if not parts.netloc or not name:
        raise OSError(f"{public_url(url)}: write {parts.scheme}://BUCKET/NAME")
    return parts.netloc, name


def _obstore(url: str, extra: str):
    try:
        import obstore
        import obstore.store
    except ImportError as error:
        scheme = urlsplit(url).scheme
        raise OSError(
            f"{scheme}:// with credentials needs the package obstore: pip install 'priorclip-pretraining[{extra}]'"
        ) from error
    return obstore
