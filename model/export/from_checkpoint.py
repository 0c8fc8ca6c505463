"""Exports a checkpoint of a run, of any ZeRO stage, without the GPUs or ranks that wrote it.

    RUN/config.yaml                      the resolved configuration, among it the model's
        checkpoints/step_00000100/       DeepSpeed's files, one set a rank
        report.json                      figures, if the run has ended

Every run exports when it ends. This is for a run that did not end, or for an older checkpoint. DeepSpeed's offline code
joins the shards of all ranks. Batch-norm statistics differ between ranks and are averaged, as before an evaluation. If
the run keeps a moving average of its weights, the average is exported.

A run is not trusted, because somebody else may have made it: a file that could run code is refused
(common/safe_load.py), and config.yaml gives architecture and numbers only, as config.json of an export does
(model/export_config.py). The tokenizer and the text encoder's sizes that it names are loaded without code of their own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from priorclip.common.checkpoint_files import (
    average_buffers,
    find_checkpoints,
    find_damage,
    join_pieces,
    load_ranks,
)
from priorclip.common.output import get_logger
from priorclip.common.safe_load import load_tensors, only_safe_loads
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.common.untrusted_json import read_object
from priorclip.common.untrusted_yaml import read_yaml
from priorclip.model.build import build_model
from priorclip.model.config import ModelConfig
from priorclip.model.encoders.weights import State
from priorclip.model.export.folder import save_pretrained
from priorclip.model.export_config import config_of_run
from priorclip.model.without_memory import without_memory

log = get_logger(__name__)

MAX_BYTES = 4 << 20  # of config.yaml and of report.json


def export_run(
    run: str | Path, folder: str | Path, checkpoint: str | None = None, tokenizer: str | None = None
) -> Path:
    """Writes the export folder.

    Args:
        run: run directory
        folder: output folder
        checkpoint: name of a folder under ``checkpoints``; None for the newest
        tokenizer: hub id or folder; None for the tokenizer of the run
    Raises:
        OSError, ValueError: no run, no such checkpoint, a damaged one, no tokenizer
        UnsafeFile: a file of the checkpoint could run code
    """
    run = Path(run)
    settings = read_settings(run)
    chosen = find_checkpoint(run, checkpoint)
    state = whole_state(chosen)
    try:
        config = config_of_run(settings["model"])
    except ValueError as error:
        raise ValueError(f"{run / 'config.yaml'}: {error}") from error
    vocabulary = vocabulary_of(state, config)
    with without_memory():
        config.vision.weights = config.prior.weights = config.text.weights = None
        model = build_model(config, vocabulary)
        own = model.state_dict()
    state = {name: value.to(own[name].dtype) if name in own else value for name, value in state.items()}
    extra: dict[str, Any] = {"checkpoint": chosen.name}
    report = run / "report.json"
    if checkpoint is None and report.is_file():
        extra |= read_object(report, MAX_BYTES)
    with tempfile.TemporaryDirectory() as files:
        save_tokenizer(run, settings, model.config, tokenizer, Path(files))
        return save_pretrained(state, model.config, folder, files, extra)


def read_settings(run: Path) -> Mapping[str, Any]:
    """Returns the run's config.yaml. Raises ValueError if the run has no model with two towers, like a scene prior."""
    path = run / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--input {run} is neither an export folder nor a run: it has no config.yaml")
    settings = read_yaml(path, MAX_BYTES)
    if not isinstance(settings, Mapping) or "model" not in settings:
        raise ValueError(f"{path} configures no model with two towers")
    return settings


def find_checkpoint(run: Path, name: str | None) -> Path:
    """Returns the checkpoint of that name, or the newest one whose checksums match.

    Raises:
        FileNotFoundError: there is none
        ValueError: the named one, or every one, is damaged
    """
    folder = run / "checkpoints"
    found = find_checkpoints(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    if name is not None:
        if folder / name not in found:
            raise FileNotFoundError(
                f"{folder} has no checkpoint '{name}': there are {', '.join(p.name for p in reversed(found))}"
            )
        found = [folder / name]
    for path in found:
        problem = find_damage(path)
        if problem is None:
            return path
        log.warning("%s is not used: %s", path, problem)
    raise ValueError(f"{found[0]} cannot be exported: {find_damage(found[0])}")


def whole_state(checkpoint: Path) -> State:
    """Returns all weights in float32: moving averages, or else the optimizer's masters, or else the module's.

    Raises:
        UnsafeFile: a file of the checkpoint could run code
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    if list(checkpoint.glob("*_optim_states.pt")):
        with only_safe_loads():
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    else:  # stage 0 keeps the module whole, on rank 0
        path = checkpoint / "mp_rank_00_model_states.pt"
        if not path.is_file():
            raise FileNotFoundError(f"{checkpoint} has no weights: {path.name} is missing")
        weights = load_tensors(path)["module"]
    weights = {**weights, **average_buffers(checkpoint)}
    averages = load_ranks(checkpoint, "averages")
    for name in averages[0] if averages else ():
        whole = join_pieces([rank[name] for rank in averages], weights[name].numel())
        weights[name] = whole.view_as(weights[name])
    return {name: whole_tensor(value) for name, value in weights.items()}


def whole_tensor(value: Tensor) -> Tensor:
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()


def vocabulary_of(state: State, config: ModelConfig) -> int | None:
    """Returns the size of the text encoder's vocabulary, which came from the run's tokenizer."""
    rows = [value.shape[0] for name, value in state.items() if name.startswith("text.") and is_vocabulary(name)]
    return rows[0] if rows else None


def is_vocabulary(name: str) -> bool:
    return name.endswith(("token_embedding.weight", "word_embeddings.weight", "embed_tokens.weight", "wte.weight"))


def save_tokenizer(
    run: Path, settings: Mapping[str, Any], config: ModelConfig, tokenizer: str | None, files: Path
) -> None:
    """Saves ``tokenizer``, or else the one that the run wrote at its end, or else the one that config.yaml names."""
    written = run / "tokenizer"
    named = tokenizer or settings.get("tokenizer") or settings.get("init_from") or config.text.name
    name = str(written) if tokenizer is None and written.is_dir() else named
    if not isinstance(name, str):
        raise ValueError(f"{run / 'config.yaml'} names no tokenizer: give --tokenizer")
    try:
        loaded = open_tokenizer(name)
    except (OSError, ValueError) as error:
        raise OSError(f"the tokenizer '{name}' of the run cannot be loaded: give --tokenizer ({error})") from error
    loaded.model_max_length = config.text.context_length
    loaded.save_pretrained(str(files))
