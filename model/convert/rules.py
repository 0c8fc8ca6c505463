"""From a foreign checkpoint's names to ours, told from our side: each of our tensors says which of theirs it is.

    Rule(r"visual\.encoder\.model\.blocks\.(\d+)\.attn\.qkv\.weight", r"transformer.resblocks.\1.attn.in_proj_weight")

So what is missing is known by its name in the checkpoint, and what no rule asked for is left over and can be listed.
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
    """The tensor as it is, or with axes of length 1 more or less."""
    (tensor,) = found
    if tensor.shape != shape and [n for n in tensor.shape if n > 1] == [n for n in shape if n > 1]:
        return tensor.reshape(shape)
    return tensor


def transposed(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """A matrix that is multiplied from the other side."""
    return found[0].T


def stacked(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """Queries, keys and values on top of each other."""
    return torch.cat(list(found))


def third(which: int) -> Take:
    """One of the queries, keys and values that stand on top of each other."""
    return lambda found, shape: found[0].chunk(3)[which]


def inverse_log(found: Sequence[Tensor], shape: torch.Size) -> Tensor:
    """log(1 / temperature): ours is a scale, theirs divides."""
    return -found[0].log().reshape(shape)


@dataclass(frozen=True)
class Rule:
    r"""How our tensors of one pattern are made.

    Args:
        ours: regular expression that the whole of our name matches
        theirs: their name, or several, with groups of ``ours`` as \1
        take: makes our tensor of theirs
    """

    ours: str
    theirs: str | tuple[str, ...]
    take: Take = whole


def fill(
    wanted: Mapping[str, Tensor], rules: Sequence[Rule], state: State, source: str, given: State | None = None
) -> tuple[State, list[str]]:
    """All tensors that are wanted, made of the checkpoint's, float32, and the names that none of them used.

    Args:
        wanted: our state dict, shapes only (on the meta device)
        rules: the first whose pattern fits a name makes it
        state: the checkpoint
        source: its name, for messages
        given: tensors of ours that the checkpoint does not hold
    Raises:
        ValueError: names in the checkpoint that are missing, or are of another shape
    """
    made: State = dict(given or {})
    used: set[str] = set()
    missing: list[str] = []
    shapes: list[str] = []
    for name in wanted.keys() - made.keys():
        names, take = their_names(name, rules)
        lacking = [theirs for theirs in names if theirs not in state]
        used.update(names)
        if lacking:
            missing += lacking
            continue
        tensor = take([state[theirs] for theirs in names], wanted[name].shape)
        if tensor.shape != wanted[name].shape:
            shapes.append(f"{names[0]} {tuple(state[names[0]].shape)} gives {tuple(tensor.shape)}, ")
            shapes[-1] += f"wanted {tuple(wanted[name].shape)}"
        made[name] = tensor.to(wanted[name].dtype).contiguous().clone()
    problems = {"missing": sorted(set(missing)), "other shape": sorted(shapes)}
    if any(problems.values()):
        told = "; ".join(f"{what}: {first_names(names)}" for what, names in problems.items() if names)
        raise ValueError(f"{source} does not hold the model that it should: {told}")
    return made, sorted(state.keys() - used)


def their_names(name: str, rules: Sequence[Rule]) -> tuple[list[str], Take]:
    """What a tensor of ours is called in the checkpoint, and how it is made."""
    for rule in rules:
        match = re.fullmatch(rule.ours, name)
        if match:
            theirs = (rule.theirs,) if isinstance(rule.theirs, str) else rule.theirs
            return [match.expand(template) for template in theirs], rule.take
    raise ValueError(f"no rule says what '{name}' is called in this family of checkpoints")
