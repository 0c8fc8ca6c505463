"""A cache of the outputs of a frozen encoder in a folder, for runs that see the same pixels again.

    vision: {trainable: false, remember: runs/features}

A frozen encoder is a function of its input. So a sweep over the layers behind it (belief, PAE, losses, seeds) encodes
each image once, instead of once per epoch and run. The cache helps if the same inputs come back: without random crops
an image has 8 of them (rotations and flips), or one. The name of an entry is a hash of the encoder's weights and of
the input's bytes, so an outdated entry is never read. Each input takes the output's size in float32: 128 KiB for
25 tokens of 1,280 channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from priorclip.common.files import file_aside
from priorclip.model.encoders.weight_file import read_weight_file

# Vision encoder and prior get the same images, so their hashes are kept as long as the tensor lives.
KNOWN_NAMES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class FeatureCache:
    """Outputs of one frozen encoder, by input row.

    Args:
        folder: runs and ranks can share it
        encoder: its weights must not change and must not be sharded
        facts: other values that the output depends on
    """

    def __init__(self, folder: str | Path, encoder: nn.Module, facts: object = "") -> None:
        self.root, self.encoder, self.facts = Path(folder).expanduser(), encoder, repr(facts)
        self.folder: Path | None = None
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Returns ``compute(*inputs)``, a function whose rows depend on the same rows of the inputs only.

        Args:
            compute: is called with the new rows only
            inputs: tensors (B, ...)
        Returns:
            (B, ...)
        Raises:
            ValueError: the encoder is in training mode; with dropout its output is random
        """
        if self.encoder.training:
            raise ValueError(f"remember: {type(self.encoder).__name__} is in training mode, its output may be random")
        if self.folder is None:
            self.folder = self.root / fingerprint(self.encoder, self.facts)
            self.folder.mkdir(parents=True, exist_ok=True)
        names = row_names(*inputs)
        first = {name: row for row, name in reversed(list(enumerate(names)))}
        new = [row for name, row in first.items() if name not in self.outputs and not self.read(name)]
        if new:
            found = compute(*(value[new] for value in inputs))
            for row, output in zip(new, found, strict=True):
                self.outputs[names[row]] = output.detach().cpu().clone(memory_format=torch.contiguous_format)
                self.write(names[row])
        return torch.stack([self.outputs[name] for name in names]).to(inputs[0].device)

    def read(self, name: str) -> bool:
        assert self.folder is not None
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return False
        self.outputs[name] = read_weight_file(path)["output"]
        return True

    def write(self, name: str) -> None:
        """Writes the entry completely or not at all, because other runs read the folder at the same time."""
        assert self.folder is not None
        with file_aside(self.folder / f"{name}.safetensors", durable=False) as aside:
            save_file({"output": self.outputs[name]}, aside)


def row_names(*inputs: Tensor) -> list[str]:
    """Returns the hash of each row of the inputs. A tensor that was not written to since is not hashed again."""
    (first, *others) = inputs
    if others or first.is_inference():  # An inference tensor does not count its changes.
        return [digest(*rows) for rows in zip(*inputs, strict=True)]
    changes, names = KNOWN_NAMES.get(first, (-1, []))
    if changes != first._version:
        names = [digest(row) for row in first]
        KNOWN_NAMES[first] = (first._version, names)
    return names


def digest(*rows: Tensor) -> str:
    """Returns a hash of an input: its bytes, shape and dtype."""
    hasher = hashlib.blake2b(digest_size=16)
    for row in rows:
        hasher.update(f"{row.dtype}{tuple(row.shape)}".encode())
        hasher.update(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def fingerprint(encoder: nn.Module, facts: str) -> str:
    """Returns a hash of the facts and of the encoder's weights in their order.

    Raises ValueError if the weights are sharded (ZeRO 3), because no rank has all of them.
    """
    if any(hasattr(parameter, "ds_id") for parameter in encoder.parameters()):
        raise ValueError(
            "remember: under ZeRO 3 no rank has the encoder's weights whole; use run.engine.zero 0, 1 or 2"
        )
    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(facts.encode())
    for name, value in encoder.state_dict().items():
        hasher.update(f"{name}{digest(value)}".encode())
    return hasher.hexdigest()
