"""`model push` to a hub of this machine by huggingface_hub itself, and a training that starts from what it got."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from local_hub import TOKEN, LocalHub, local_hub
from PIL import Image
from real_trainings import ROOT, environment
from safetensors.torch import load, load_file
from tiny_models import BERT, tiny

from priorclip.data_shards import Record, train_tokenizer
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.model import build_model, from_pretrained, save_pretrained
from priorclip.model.__main__ import main
from priorclip.model.config import TextConfig

REPO = "user/prior"


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with figures, and files beside it that nobody wants to publish."""
    folder = tmp_path_factory.mktemp("push")
    words = train_tokenizer(["a river", "a pier"] * 5, folder / "tokenizer", vocab_size=280, context_length=16)
    text = TextConfig(config=BERT | {"vocab_size": len(words)}, context_length=16)
    model = build_model(tiny(vision="vit", text=text))
    figures = {"evaluation": {"mean_recall": 42.125}}
    export = save_pretrained(model.state_dict(), model.config, folder / "export", folder / "tokenizer", figures)
    for name in (".env", "notes.md", "optimizer.pt", "evil.py"):
        (export / name).write_text("not for the public")
    (export / "link.json").symlink_to("/etc/hostname")
    return export


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with local_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        yield running


def push(export: Path, *words: str) -> int:
    return main(["push", "--input", str(export), "--repo", REPO, *words])


def test_a_private_repository_with_the_files_of_the_export(
    export: Path, hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "port.PNG")
    card = ["--license", "mit", "--training_data", "RS5M: 5 million pairs.", "--example", str(tmp_path / "port.PNG")]
    assert push(export, *card, "--labels", "a port, a river") == 0
    assert capsys.readouterr() == (f"{hub.url}/{REPO}\n", "")
    names = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    files = hub.files[REPO]
    assert set(files) == names | {"README.md", "example.png"}
    assert all(files[name] == (export / name).read_bytes() for name in names)
    assert hub.private[REPO]
    assert hub.messages == ["Upload a model"]
    head, text = files["README.md"].decode().removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(head) == {
        "library_name": "pytorch",
        "tags": ["remote-sensing", "image-text-retrieval"],
        "pipeline_tag": "zero-shot-image-classification",
        "license": "mit",
        "widget": [
            {
                "src": f"https://huggingface.co/{REPO}/resolve/main/example.png",
                "candidate_labels": "a port, a river",
                "example_title": "example",
            }
        ],
    }
    assert "| evaluation.mean_recall | 42.12 |" in text
    assert f'encoder = Encoder.load("{REPO}")' in text
    assert "## Training data\n\nRS5M: 5 million pairs.\n" in text
    assert "## Intended use\n\nSearch of images taken from above" in text
    assert "FOLDER" not in text


def test_the_folder_for_transformers_has_its_file_of_code(export: Path, hub: LocalHub) -> None:
    assert push(export, "--format", "transformers", "--public") == 0
    files = hub.files[REPO]
    assert {"modelling_priorclip.py", "processor_config.json", "model.safetensors"} <= set(files)
    assert not {"evil.py", ".env", "optimizer.pt", "notes.md"} & set(files)
    assert not hub.private[REPO]
    card = files["README.md"].decode()
    assert "library_name: transformers\n" in card
    assert f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)' in card
    ours, theirs = load_file(export / "model.safetensors"), load(files["model.safetensors"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_export_is_not_published(
    export: Path, hub: LocalHub, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(export, tmp_path / "damaged", ignore_dangling_symlinks=True)
    (damaged / name).write_bytes((export / name).read_bytes()[:-100])
    assert push(damaged) == 2
    error = capsys.readouterr().err
    assert str(damaged) in error
    assert error.count("\n") == 1
    assert hub.files == {}


def test_a_public_repository_needs_the_option(export: Path, hub: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files[REPO], hub.private[REPO] = {"README.md": b"old"}, False
    assert push(export) == 2
    assert "user/prior is public, so everybody could read the model: give --public" in capsys.readouterr().err
    assert hub.files[REPO] == {"README.md": b"old"}
    assert push(export, "--public") == 0
    assert "model.safetensors" in hub.files[REPO]


@pytest.mark.parametrize("token", ["hf_" + "w" * 34, None])
def test_the_token_is_needed_and_never_printed(
    token: str | None, export: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", token or "")
    assert push(export) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    reason = "does not take user/prior" if token else "does not know you: set HF_TOKEN to one of your tokens"
    assert error.startswith(f"model push: error: the hub {reason}")
    assert token is None or token not in error
    assert hub.files == {}


@pytest.mark.parametrize("repo", ["prior", "../prior", "user/prior/x", "user/prior@v1", "hf://user/prior"])
def test_a_wrong_name_is_said_to_be_so(repo: str, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", "--input", str(export), "--repo", repo]) == 2
    assert capsys.readouterr().err == (f"model push: error: --repo {repo} must be user/name or organisation/name\n")


def test_a_training_starts_from_the_hub_and_takes_no_code(export: Path, hub: LocalHub, tmp_path: Path) -> None:
    """At learning rate 0 a training exports the weights that it started from."""
    assert push(export, "--format", "transformers") == 0
    hub.files[REPO]["pytorch_model.bin"] = b"a pickle of somebody else"
    pictures = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(pictures):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(path)
    pack([Record(str(n), path, ["a river"], None) for n, path in enumerate(pictures)], tmp_path / "shards", PackPlan())
    words = ["pretrain", "--init_from", f"hf://{REPO}", "--data.shards", tmp_path / "shards", "--data.workers", 0,
             "--run.dir", tmp_path / "run", "--run.epochs", 1, "--run.engine.global_batch", 4,
             "--run.optimizer.lr", 0, "--run.engine.zero", 0, "--loss.lambda_cs", 0]  # fmt: skip
    variables = environment() | hub.environment(tmp_path / "home") | {"HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr  # no bars of the hub in a log
    ours, theirs = load_file(export / "model.safetensors"), load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "running" not in name)
    fetched = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= fetched
    assert not [name for name in fetched if name.endswith((".py", ".bin"))]
    assert from_pretrained(tmp_path / "run" / "export").config.embed_dim == from_pretrained(export).config.embed_dim
