r"""Renames the tensors of a foreign checkpoint. Each rule gives, for our names of one pattern, the name over there.

    Rule(r"visual\.encoder\.model\.blocks\.(\d+)\.attn\.qkv\.weight", r"transformer.resblocks.\1.attn.in_proj_weight")

So an error can name the missing tensors of the checkpoint, and tensors that no rule uses can be listed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from priorclip.model.encoders.weights import State, first_names

Take = Callable[[Sequence[Tensor], torch.Size], Tensor]


def whole(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Takes the tensor, and adds or removes axes of length 1."""
    (tensor,) = found
    if tensor.shape != shape and [n for n in tensor.shape if n > 1] == [n for n in shape if n > 1]:
        return tensor.reshape(shape)
    return tensor


def transposed(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Transposes a matrix."""
    return found[0].T


def stacked(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Stacks queries, keys and values."""
    return torch.cat(list(found))


def one_of_three(which: int) -> Take:
    """Takes queries, keys or values from their stack."""
    return lambda found, shape: found[0].chunk(3)[which]


def inverse_log(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Returns log(1 / temperature): ours multiplies the logits, theirs divides them."""
    return -found[0].log().reshape(shape)


@dataclass(frozen=True)
class Rule:
    r"""How to make our tensors whose names match one pattern.

    Args:
        ours: regular expression for the whole of our name
        theirs: their name, or several, with groups of ``ours`` as \1
        take: makes our tensor from theirs
    """

    ours: str
    theirs: str | tuple[str, ...]
    take: Take = whole


def fill(
    wanted: Mapping[str, Tensor], rules: Sequence[Rule], state: State, source: str, given: State | None = None
) -> tuple[State, list[str]]:
    """Returns all wanted tensors, made from the checkpoint, and the names in the checkpoint that none of them used.

    Args:
        wanted: our state dict on the meta device: shapes and dtypes
        rules: the first rule whose pattern matches a name is used
        state: the checkpoint
        source: its name, for messages
        given: our tensors that the checkpoint does not hold
    Raises:
        ValueError: tensors of the checkpoint are missing or have another shape; the message names them
    """
    made: State = dict(given or {})
    used: set[str] = set()
    missing: list[str] = []
    shapes: list[str] = []
    for name in wanted.keys() - made.keys():
        names, take = their_names(name, rules)
        absent = [theirs for theirs in names if theirs not in state]
        used.update(names)
        if absent:
            missing += absent
            continue
        tensor = take([state[theirs] for theirs in names], wanted[name].shape)
        if tensor.shape != wanted[name].shape:
            shapes.append(f"{names[0]} {tuple(state[names[0]].shape)} gives {tuple(tensor.shape)}, ")
            shapes[-1] += f"wanted {tuple(wanted[name].shape)}"
        made[name] = tensor.to(wanted[name].dtype).contiguous().clone()
    problems = {"missing": sorted(set(missing)), "other shape": sorted(shapes)}
    if any(problems.values()):
        details = "; ".join(f"{what}: {first_names(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{source} does not hold the expected model: {details}")
    return made, sorted(state.keys() - used)


def their_names(name: str, rules: Sequence[Rule]) -> tuple[list[str], Take]:
    """Returns the names in the checkpoint of one of our tensors, and the function that makes it."""
    for rule in rules:
        match = re.fullmatch(rule.ours, name)
        if match:
            theirs = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return [match.expand(template) for template in theirs], rule.take
    raise ValueError(f"no rule for '{name}' in this family of checkpoints")
