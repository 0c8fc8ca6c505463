"""`python -m model convert`: the files that it reads, writes and refuses; no code in a file is executed."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from foreign_models import VOCABULARY, images, normalised, open_clip_model, texts, tiny_open_clip
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from priorclip.model import presets
from priorclip.model.__main__ import main
from priorclip.model.commands import ConvertConfig
from priorclip.model.config import to_dict
from priorclip.model.convert import convert
from priorclip.model.convert.checkpoint import read_checkpoint
from priorclip.model.convert.torchscript import read_torchscript
from priorclip.model.export.folder import from_pretrained

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def theirs():
    return tiny_open_clip()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer small enough for a vocabulary of 600."""
    folder = tmp_path_factory.mktemp("words")
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "[END]": 2}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[END]", eos_token="[END]").save_pretrained(str(folder))
    return str(folder)


def converted(path, folder, words, **options):
    options = {"tokenizer": words} | options
    return convert(ConvertConfig(input=str(path), output=str(folder / "out"), **options))


def write_as(kind, model, folder):
    """Writes the model in the formats of trainers and hubs."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = folder / f"{kind}.pt"
    if kind == "open_clip trainer":
        prefixed = {f"module.{name}": value for name, value in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"step": torch.zeros(1)}}, path)
    elif kind == "compiled":
        torch.save({f"_orig_mod.module.{name}": value for name, value in state.items()}, path)
    elif kind == "bare":
        torch.save(state, path)
    elif kind == "half":
        torch.save({name: value.half() for name, value in state.items()}, path)
    elif kind == "safetensors":
        path = folder / "model.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    elif kind == "hub folder":
        path = folder / "hub"
        path.mkdir()
        save_file({n: v.contiguous() for n, v in state.items()}, path / "open_clip_model.safetensors")
    return path


@pytest.mark.parametrize("kind", ["open_clip trainer", "compiled", "bare", "safetensors", "hub folder"])
def test_every_way_of_writing_gives_the_same_model(theirs, words, tmp_path, kind):
    result = converted(write_as(kind, theirs, tmp_path), tmp_path, words)
    assert result.unused == []
    model = from_pretrained(tmp_path / "out")
    pixels, (ids, mask) = images(64), texts(24)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_image(pixels), theirs.encode_image(normalised(pixels), True), rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.encode_text(ids, mask), theirs.encode_text(ids, True), rtol=0, atol=1e-5)


def test_half_precision_becomes_float32(theirs, words, tmp_path):
    result = converted(write_as("half", theirs, tmp_path), tmp_path, words)
    assert {value.dtype for value in result.state.values()} == {torch.float32}


def test_command_lists_what_it_did_not_use(theirs, words, tmp_path, capsys):
    state = theirs.state_dict() | {"decoder.bias": torch.zeros(()), "decoder.weight": torch.zeros(2)}
    torch.save(state, tmp_path / "more.pt")
    arguments = ["convert", "--input", str(tmp_path / "more.pt"), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--tokenizer", words]) == 0
    told = capsys.readouterr().out
    assert "not used: 2\n    decoder.bias\n    decoder.weight\n" in told
    assert "activation gelu" in told
    assert "more.pt" in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["kind"] == "clip"


def test_missing_and_misshapen_keys_are_named_and_nothing_is_written(theirs, words, tmp_path, capsys):
    state = theirs.state_dict()
    del state["visual.transformer.resblocks.1.attn.in_proj_weight"]
    state["ln_final.weight"] = torch.zeros(63)
    torch.save(state, tmp_path / "less.pt")
    command = ["convert", "--input", str(tmp_path / "less.pt"), "--output", str(tmp_path / "out"), "--tokenizer", words]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "missing: visual.transformer.resblocks.1.attn.in_proj_weight" in told
    assert "other shape: ln_final.weight (63,) gives (63,), wanted (64,)" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", ["visual.proj", "token_embedding.weight", "positional_embedding", "logit_scale"])
def test_a_key_that_sizes_are_read_from_is_named_too(theirs, words, tmp_path, gone):
    torch.save({name: value for name, value in theirs.state_dict().items() if name != gone}, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=f"missing: {gone}"):
        converted(tmp_path / "less.pt", tmp_path, words)


def test_a_release_that_was_cut_at_its_end_is_refused(words, tmp_path):
    """A text tower of the published width with one block instead of twelve: no tensor of this model is missing."""
    short = open_clip_model("ViT-B-32", 1, image_size=64, width=64, head_width=64)
    torch.save(short.state_dict(), tmp_path / "short.pt")
    with pytest.raises(ValueError, match="missing: blocks 1 to 11 of the text tower, which has 12 at width 512"):
        converted(tmp_path / "short.pt", tmp_path, words, format="remoteclip")
    assert not (tmp_path / "out").exists()
    assert converted(tmp_path / "short.pt", tmp_path, words).notes[-1].startswith("shorter than any published: blocks")


def test_an_unknown_family_is_an_error(words, tmp_path):
    torch.save({"backbone.weight": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"of no known family: its keys are backbone\.weight"):
        converted(tmp_path / "x.pt", tmp_path, words)
    with pytest.raises(ValueError, match=r"is not of --format pir: its keys are backbone\.weight"):
        converted(tmp_path / "x.pt", tmp_path, words, format="pir")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt: no such file"):
        converted(tmp_path / "nowhere.pt", tmp_path, words)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt"):
        converted(tmp_path / "text.pt", tmp_path, words)
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="is damaged"):
        converted(tmp_path / "text.safetensors", tmp_path, words)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        converted(tmp_path / "list.pt", tmp_path, words)


def test_a_visual_tower_that_is_no_vit_is_said(words, tmp_path):
    state = {"visual.conv1.weight": torch.zeros(2), "visual.layer1.0.conv1.weight": torch.zeros(2)}
    torch.save(state | {"visual.class_embedding": torch.zeros(2)}, tmp_path / "rn50.pt")
    with pytest.raises(ValueError, match="has a ResNet as its visual tower"):
        converted(tmp_path / "rn50.pt", tmp_path, words)


class Trap:
    """Unpickling it creates a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_pickle_is_never_executed(theirs, words, tmp_path):
    mark = tmp_path / "executed"
    torch.save({"state_dict": theirs.state_dict(), "args": Trap(mark)}, tmp_path / "trap.pt")
    with pytest.raises(ValueError, match="holds more than weights, and reading it would execute its code"):
        converted(tmp_path / "trap.pt", tmp_path, words)
    assert not mark.exists()
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert mark.exists(), "the trap must work, or this test shows nothing"


class Towers(torch.nn.Module):
    """Nested modules, a buffer, a half precision tensor and a shared storage, as in OpenAI's archives."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.BatchNorm2d(4))
        self.scale = torch.nn.Parameter(torch.tensor(2.5))
        self.rounded = torch.nn.Parameter(torch.randn(3, 5).half().T)

    def forward(self, x):
        return self.visual(x) * self.scale + self.rounded.float().sum()


@pytest.fixture
def archive(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "archive.pt"
    torch.jit.script(Towers()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_read_without_running_it(archive):
    expected = torch.jit.load(str(archive)).state_dict()
    found = read_torchscript(archive)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    assert read_checkpoint(archive).scripted


@pytest.mark.filterwarnings("ignore")
def test_an_archive_that_names_code_is_refused(archive, tmp_path):
    mark = tmp_path / "executed"
    trapped = tmp_path / "trapped.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(trapped, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickle.dumps(Trap(mark), 2) if name.endswith("/data.pkl") else old.read(name))
    with pytest.raises(ValueError, match=r"it names (posix|nt|os)\.mkdir, which no archive of weights needs"):
        read_checkpoint(trapped)
    assert not mark.exists()


@pytest.mark.filterwarnings("ignore")
def test_openai_archive_is_recognised(words, tmp_path):
    """A scripted model with OpenAI's names gets QuickGELU without an option."""

    class Shell(torch.nn.Module):
        def __init__(self, clip):
            super().__init__()
            for name, child in clip.named_children():
                setattr(self, name, bare(child))
            for name, parameter in clip.named_parameters(recurse=False):
                setattr(self, name, parameter)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def bare(module):
        """The parameters of a module under their names; the code of OpenAI's is not needed."""
        shell = torch.nn.Module()
        for name, parameter in module.named_parameters(recurse=False):
            shell.register_parameter(name, parameter)
        for name, child in module.named_children():
            shell.add_module(name, bare(child))
        return shell

    theirs = tiny_open_clip()
    torch.jit.script(Shell(theirs)).save(str(tmp_path / "ViT.pt"))
    result = converted(tmp_path / "ViT.pt", tmp_path, words)
    assert result.notes[0] == "format openai"
    assert result.config.text.config["hidden_act"] == "quick_gelu"
    assert "quickgelu" in result.config.vision.name
    assert torch.equal(result.state["text_projection.weight"], theirs.text_projection.T)


def test_context_length_is_cut_and_never_made_up(theirs, words, tmp_path):
    path = write_as("bare", theirs, tmp_path)
    result = converted(path, tmp_path, words, context_length=10)
    assert result.config.text.context_length == 10
    model = from_pretrained(tmp_path / "out")
    ids, mask = texts(10)
    padded = torch.cat([ids, torch.zeros(3, 14, dtype=torch.long)], 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids, mask), theirs.encode_text(padded, True), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="--context_length 30: the checkpoint has positions for 24 tokens"):
        converted(path, tmp_path, words, context_length=30)


def test_a_preset_sets_values_that_the_keys_do_not_tell(theirs, words, tmp_path, monkeypatch):
    """The keys do not tell heads of 16 channels and QuickGELU."""
    torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
    plain = converted(tmp_path / "tiny.pt", tmp_path, words).config
    vision = {"name": "vit_base_patch32_clip_quickgelu_224", "kwargs": plain.vision.kwargs | {"num_heads": 8}}
    values = to_dict(plain) | {"vision": to_dict(plain)["vision"] | vision | {"weights": "hub"}, "kind": "priorclip"}
    (tmp_path / "mine.yaml").write_text(json.dumps(values))
    monkeypatch.setattr(presets, "FOLDER", tmp_path)
    result = converted(tmp_path / "tiny.pt", tmp_path, words, preset="mine")
    assert (result.config.kind, result.config.vision.kwargs["num_heads"]) == ("clip", 8)
    assert "quickgelu" in result.config.vision.name
    with pytest.raises(ValueError, match="which has its own activation"):
        converted(tmp_path / "tiny.pt", tmp_path, words, preset="mine", activation="gelu")
    (tmp_path / "mine.yaml").write_text(json.dumps(values | {"embed_dim": 33}))
    with pytest.raises(
        ValueError, match=r"other shape: .*visual\.proj \(128, 32\) gives \(32, 128\), wanted \(33, 128\)"
    ):
        converted(tmp_path / "tiny.pt", tmp_path, words, preset="mine")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(theirs, tmp_path):
    core = Tokenizer(models.WordLevel({str(n): n for n in range(VOCABULARY + 1)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(str(tmp_path / "large"))
    with pytest.raises(ValueError, match="has 601 entries, but the text encoder has 600"):
        converted(write_as("bare", theirs, tmp_path), tmp_path, str(tmp_path / "large"))
