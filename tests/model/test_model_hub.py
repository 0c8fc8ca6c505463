"""`model fetch` and its messages, with processes that use a hub of this machine, or none."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from local_hub import LocalHub, local_hub
from real_trainings import ROOT, environment
from safetensors.torch import save
from transformers import BertConfig, BertModel

from priorclip.common import hub as hub_module
from priorclip.common.hub import NotFetched, hub_id, using_hub
from priorclip.model import load_preset
from priorclip.model.commands import FetchConfig
from priorclip.model.fetch import fetch, parts_of_preset

BACKBONE = "resnet10t.c3_in1k"
NOWHERE = {"HF_ENDPOINT": "http://127.0.0.1:9", "NO_PROXY": "*"}


def run(*words: object, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    command = [sys.executable, "-m", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=clean | variables, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with local_hub() as running:
        yield running


@pytest.fixture(scope="module")
def text_encoder(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small BERT with its tokenizer on the hub."""
    from priorclip.data_shards import train_tokenizer

    folder = tmp_path_factory.mktemp("bert")
    train_tokenizer(["a river", "a pier"] * 5, folder, vocab_size=280, context_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    BertModel(BertConfig(vocab_size=280, **sizes)).save_pretrained(str(folder))
    hub.files["user/bert"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    return "user/bert"


@pytest.mark.parametrize(
    ("preset", "parts"),
    [
        (
            "priorclip-b32",
            [
                "vision: vit_base_patch32_clip_quickgelu_224.openai",
                "prior: resnet50",
                "text: openai/clip-vit-base-patch32",
                "tokenizer: openai/clip-vit-base-patch32",
            ],
        ),
        ("priorclip-lite0-minilm", []),
        ("priorclip-tiny", []),
    ],
)
def test_what_a_preset_needs(preset: str, parts: list[str]) -> None:
    assert [title for title, _ in parts_of_preset(load_preset(preset))] == parts


def test_fetched_once_then_found_without_internet(hub: LocalHub, text_encoder: str, tmp_path: Path) -> None:
    """The second process gets weights of the first one's HF_HOME, and asks nobody."""
    state = timm.create_model(BACKBONE, pretrained=False).state_dict()
    hub.files[f"timm/{BACKBONE}"] = {"model.safetensors": save(state)}
    words = ["model", "fetch", "--timm", BACKBONE, "--transformers", text_encoder]
    home = tmp_path / "home"
    fetched = run(*words, variables=hub.environment(home))
    assert fetched.returncode == 0, fetched.stderr
    lines = [
        f"timm: {BACKBONE}",
        f"text: {text_encoder}",
        f"tokenizer: {text_encoder}",
        f"all of it is in HF_HOME={home}",
    ]
    assert fetched.stdout.splitlines() == lines
    asked = len(hub.requests)
    again = run(*words, variables=hub.environment(home) | {"HF_HUB_OFFLINE": "1"})
    assert (again.returncode, again.stdout) == (0, fetched.stdout), again.stderr
    assert len(hub.requests) == asked
    code = (
        "import sys, torch; from priorclip.model import EncoderConfig; "
        "from priorclip.model.encoders.vision import create_backbone; "
        f"model = create_backbone(EncoderConfig(name={BACKBONE!r}, weights='hub'), True)[0]; "
        "torch.save(model.conv1[0].weight, sys.argv[1])"
    )
    offline = environment() | NOWHERE | {"HF_HOME": str(home)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pt")], cwd=ROOT, env=offline, check=True, timeout=240)
    assert torch.equal(torch.load(tmp_path / "w.pt"), state["conv1.0.weight"])


def test_a_training_without_internet_says_what_to_fetch(tmp_path: Path) -> None:
    words = [
        "pretrain",
        "--preset",
        "priorclip-b32",
        "--data.shards",
        tmp_path / "shards",
        "--run.dir",
        tmp_path / "run",
    ]
    done = run(*words, variables=NOWHERE | {"HF_HOME": str(tmp_path / "home")})
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "accelerator" not in line]
    assert errors == [
        f"pretrain: error: 'openai/clip-vit-base-patch32' is not in HF_HOME ({tmp_path / 'home'}) and the hub is not "
        "reachable (http://127.0.0.1:9: [Errno 111] Connection refused): run `python -m model fetch --preset "
        "priorclip-b32` where there is internet, with the same HF_HOME"
    ]


def test_fetch_names_its_own_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "why_offline", lambda: "no route")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    config = FetchConfig(timm=BACKBONE, transformers="user/bert")
    words = re.escape(f"(no route): run `python -m model fetch --timm {BACKBONE} --transformers user/bert` where")
    with pytest.raises(NotFetched, match=words):
        fetch(config)
    with pytest.raises(ValueError, match="name what to fetch: --preset"):
        FetchConfig()
    with pytest.raises(ValueError, match="is a path of this machine: name an export as hf://user/name"):
        fetch(FetchConfig(init_from=str(tmp_path)))


def test_other_errors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "why_offline", lambda: "no route")
    with using_hub("user/bert"):
        assert constants.HF_HUB_OFFLINE
    error = ValueError("no such format")
    with pytest.raises(ValueError, match="no such format"), using_hub("user/bert"):
        raise error
    assert not constants.HF_HUB_OFFLINE


def test_what_names_a_repository_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id("hf://user/name") == ("user/name", None)
    assert hub_id("hf://user/name@v1.0") == ("user/name", "v1.0")
    assert hub_id("hf://runs/export") == ("runs/export", None)
    assert hub_id("user/name") == ("user/name", None)
    for path in ("runs/export", "runs", "/tmp/x", "./user/name", "user/name/more", "user/name@v1", tmp_path):
        assert hub_id(path) is None
    for bad in ("hf://name", "hf://../name", "hf://user/name/file", "hf://"):
        with pytest.raises(ValueError, match="is no id of the hub: write hf://user/name"):
            hub_id(bad)
