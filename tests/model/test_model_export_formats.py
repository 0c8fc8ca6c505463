"""`python -m model export` and other ways to load: open_clip's format, AutoModel, hub ids, a run's checkpoints."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign_models import images, normalised, texts, tiny_open_clip
from tiny_models import tiny

from priorclip.common.checkpoint_record import CHECKSUMS, load_sealed, write_record
from priorclip.model import from_pretrained, save_pretrained
from priorclip.model.__main__ import main
from priorclip.model.build import build_model
from priorclip.model.convert import open_clip
from priorclip.model.convert.checkpoint import Checkpoint
from priorclip.model.convert.family import Request

library = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain CLIP's export folder and the open_clip model that it was converted from."""
    theirs = tiny_open_clip()
    found = open_clip.convert(Checkpoint("tiny", theirs.state_dict()), Request("open_clip"))
    return save_pretrained(found.state, found.config, tmp_path_factory.mktemp("plain") / "export"), theirs


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    torch.manual_seed(0)
    model = build_model(tiny()).eval()
    return save_pretrained(model.state_dict(), model.config, tmp_path_factory.mktemp("ours") / "export"), model


def test_open_clip_reads_what_we_write(plain, tmp_path, capsys):
    folder, theirs = plain
    assert main(["export", "--input", str(folder), "--output", str(tmp_path / "out"), "--format", "open_clip"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    back, _, transform = library.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    assert (back.visual.image_size, transform.transforms[0].size) == ((64, 64), 64)
    ids, _ = texts(24)
    with torch.no_grad():
        torch.testing.assert_close(back.eval().encode_text(ids), theirs.encode_text(ids))
        pixels = normalised(images(64))
        torch.testing.assert_close(back.encode_image(pixels), theirs.encode_image(pixels))


def test_models_that_open_clip_does_not_have_are_errors(ours, tmp_path, capsys):
    arguments = ["export", "--input", str(ours[0]), "--output", str(tmp_path / "out"), "--format", "open_clip"]
    assert main(arguments) == 2
    assert "open_clip's format holds ViTs of CLIP; the visual encoder is 'test_vit'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["export", "--input", str(ours[0]), "--output", str(tmp_path / "out")]) == 2
    assert "is an export folder already" in capsys.readouterr().err
    assert main(["export", "--input", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "is neither an export folder nor a run" in capsys.readouterr().err


def test_auto_model_loads_the_same_weights(ours):
    from transformers import AutoConfig, AutoModel

    from priorclip.model.export import transformers_auto

    folder, made = ours
    found = AutoModel.from_pretrained(str(folder))
    assert type(found) is transformers_auto.PriorCLIPModel
    assert not found.training
    assert AutoConfig.from_pretrained(str(folder)).ours() == made.config
    pixels, ids, mask = images(64), torch.randint(1, 60, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    with torch.no_grad():
        out, expected = found(pixel_values=pixels, input_ids=ids, attention_mask=mask), made(pixels, ids, mask)
    assert torch.equal(out.image_embeds, expected["image_features"])
    assert torch.equal(out.text_embeds, expected["text_features"])
    assert out.logits_per_image.shape == (2, 3)
    assert AutoModel.from_pretrained(str(folder), dtype=torch.bfloat16).inner.logit_scale.dtype == torch.bfloat16


def test_auto_model_is_registered_by_importing_model(ours, tmp_path):
    """In its own process without downloads; a model that AutoModel loads can be saved as an export folder."""
    code = (
        "import transformers, model; found = transformers.AutoModel.from_pretrained(r'{0}'); "
        "found.save_pretrained(r'{1}'); print(type(found).__name__, type(model.from_pretrained(r'{0}')).__name__)"
    ).format(ours[0], tmp_path / "again")
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": "/usr/bin",
                   "HTTPS_PROXY": "http://127.0.0.1:9"}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "PriorCLIPModel PriorCLIP", done.stderr
    again = from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in ours[1].state_dict().items())


def test_hub_ids_are_read_from_the_cache(ours, tmp_path):
    """Uses the hub's cache on the disk as after a download, without a network."""
    snapshot = tmp_path / "models--someone--prior-clip" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in ours[0].iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    references = tmp_path / "models--someone--prior-clip" / "refs"
    references.mkdir()
    (references / "main").write_text("abc")
    found = from_pretrained("someone/prior-clip", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(found.encode_image(images(64)), ours[1].encode_image(images(64)))
    with pytest.raises(FileNotFoundError, match="someone/nothing is no folder here, and the hub does not give it"):
        from_pretrained("someone/nothing", cache_dir=tmp_path, local_files_only=True)


def train(folder, data, zero):
    root = Path(__file__).resolve().parents[2]
    words = ["--data.shards", data / "train", "--data.workers", 0, "--data.image_size", 96, "--run.dir", folder,
             "--tokenizer", data / "tokenizer", "--run.epochs", 1, "--run.engine.global_batch", 8,
             "--run.engine.zero", zero, "--run.checkpoint.every", 1, "--run.checkpoint.keep", 3,
             "--model.text.context_length", 16, "--run.progress", "false"]  # fmt: skip
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in ranks}
    environment |= {"PYTHONPATH": str(root), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "pretrain", "--preset", "priorclip-tiny", *map(str, words)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from priorclip.data_shards.__main__ import main as data_shards

    folder = tmp_path_factory.mktemp("data")
    drawn = ["pack", "--source", "synthetic", "--count", "16", "--size", "96", "--workers", "1"]
    assert data_shards([*drawn, "--output", str(folder / "train")]) == 0
    words = ["tokenizer", "--shards", str(folder / "train"), "--output", str(folder / "tokenizer")]
    assert data_shards([*words, "--vocab-size", "300", "--context-length", "16"]) == 0
    return folder


def test_a_runs_checkpoint_becomes_the_runs_export(data, tmp_path, caplog, capsys):
    """Under ZeRO-3; tests/pretrain/test_pretrain_grad_cache.py reads checkpoints of all stages."""
    train(tmp_path / "run", data, zero=3)
    arguments = ["export", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    made, expected = from_pretrained(tmp_path / "out"), from_pretrained(tmp_path / "run" / "export")
    assert made.config == expected.config
    for name, value in expected.state_dict().items():
        assert torch.equal(made.state_dict()[name], value), name
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "README.md"} <= names
    assert "checkpoint | step_00000002" in (tmp_path / "out" / "README.md").read_text()
    first = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))[0]
    assert main([*arguments[:-1], str(tmp_path / "first"), "--checkpoint", first]) == 0
    earlier = from_pretrained(tmp_path / "first").state_dict()
    assert any(not torch.equal(earlier[name], value) for name, value in expected.state_dict().items())
    assert main([*arguments, "--checkpoint", "step_9"]) == 2

    # Half-written ones are no candidates, damaged ones are passed over, ranks' batch-norm statistics are averaged.
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000003.partial-0123abcd")
    damaged = shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000004")
    write_record(damaged / CHECKSUMS, {**load_sealed(damaged / CHECKSUMS), "step": 4})
    states = next(damaged.glob("*_optim_states.pt"))
    flipped = bytearray(states.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    states.write_bytes(flipped)
    own = next((checkpoints / "step_00000002").glob("buffers_rank_*.pt"))
    other = {name: value + 2 for name, value in torch.load(own, weights_only=True).items()}
    torch.save(other, own.with_name("buffers_rank_00001.pt"))
    assert main([*arguments[:-1], str(tmp_path / "again")]) == 0
    assert f"{damaged} is not used: {states.name} does not match its checksum" in caplog.text
    again = from_pretrained(tmp_path / "again").state_dict()
    assert any(name.endswith("running_var") for name in other)
    for name, value in expected.state_dict().items():
        counted = other[name] if not value.is_floating_point() and name in other else value + (name in other)
        assert torch.equal(again[name], counted) or (again[name] - counted).abs().max() < 1e-6, name
    assert main([*arguments, "--checkpoint", damaged.name]) == 2
    assert f"{damaged} cannot be exported" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["text"]["config"]["vocab_size"] == 300
