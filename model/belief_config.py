"""The options of belief: by which rule the instruction weights the visual tokens.

belief: {mode: soft}                              # the paper's
belief: {mode: hard, k: 40}
belief: {mode: dropout, draws: 8, dropout: 0.1}   # a rival of soft belief; networks/rivals.py has them all
belief: {mode: given, given: complement}          # an experiment: belief is told, not computed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAPER_MODES = ("soft", "hard", "none")
RIVAL_MODES = ("attention", "gate", "entropy", "dropout", "evidential", "random", "uniform")
GIVEN = ("mask", "complement", "noise")


@dataclass
class BeliefConfig:
    """How the instruction weights the visual tokens (PriorCLIP paper, arXiv 2405.10160, section III).

    Args:
        mode: soft: F * (M + 1/sqrt(R)). hard: keep the k tokens of highest belief. none: keep tokens unchanged. The
            others are rivals of soft belief: attention (learned query), gate (learned), entropy (soft, tempered by the
            entropy of M), dropout (mean of M over its deviation), evidential (Dirichlet), and the controls random
            (soft, shuffled) and uniform (the mean of soft for each token). given: an experiment, soft belief of a map
            that is not computed but comes with the image
        k: number of tokens that ``hard`` keeps
        compat: paper: as published. released: as in the authors' code, for their checkpoints
        draws: number of draws of the instruction for ``dropout``
        dropout: share of the instruction's channels that a draw of ``dropout`` sets to zero
        given: the map of ``given``. mask: the true mask of a drawn scene, which shards have after
            ``data_shards pack --source synthetic --masks true``. complement: all but the true mask. noise: random
            numbers, which need no masks
    """

    mode: Literal[
        "soft", "hard", "none", "attention", "gate", "entropy", "dropout", "evidential", "random", "uniform", "given"
    ] = "soft"
    k: int | None = None
    compat: Literal["paper", "released"] = "paper"
    draws: int = 8
    dropout: float = 0.1
    given: Literal["mask", "complement", "noise"] = "mask"

    @property
    def needs_masks(self) -> bool:
        """Whether each image must come with its true mask."""
        return self.mode == "given" and self.given != "noise"

    def __post_init__(self) -> None:
        if self.mode not in (*PAPER_MODES, *RIVAL_MODES, "given"):
            raise ValueError(
                f"belief.mode must be soft, hard or none, or one of {', '.join(RIVAL_MODES)}, given, not '{self.mode}'"
            )
        if self.given not in GIVEN:
            raise ValueError(f"belief.given must be {', '.join(GIVEN[:-1])} or {GIVEN[-1]}, not '{self.given}'")
        if self.compat not in ("paper", "released"):
            raise ValueError(f"belief.compat must be paper or released, not '{self.compat}'")
        if self.compat == "released" and self.mode not in PAPER_MODES:
            raise ValueError(f"belief.compat 'released' has no mode '{self.mode}': set belief.compat to paper")
        if self.mode == "hard" and (self.k is None or self.k < 1):
            raise ValueError(f"belief.mode 'hard' needs belief.k, the number of tokens to keep, not {self.k}")
        if self.draws < 2:
            raise ValueError(f"belief.draws must be at least 2, because a deviation is taken of them, not {self.draws}")
        if not 0 < self.dropout < 1:
            raise ValueError(f"belief.dropout must lie in (0, 1), not {self.dropout}")
