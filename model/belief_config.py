"""The options of belief: by which rule the instruction weights the visual tokens.

belief: {mode: soft}                              # the paper's
belief: {mode: hard, k: 40}
belief: {mode: dropout, draws: 8, dropout: 0.1}   # a rival of soft belief; networks/rivals.py has them all
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PAPER_MODES = ("soft", "hard", "none")
RIVAL_MODES = ("attention", "gate", "entropy", "dropout", "evidential", "random", "uniform")


@dataclass
class BeliefConfig:
    """How the instruction weights the visual tokens (PriorCLIP paper, arXiv 2405.10160, section III).

    Args:
        mode: soft: F * (M + 1/sqrt(R)). hard: keep the k tokens of highest belief. none: keep tokens unchanged. The
            others are rivals of soft belief: attention (learned query), gate (learned), entropy (soft, tempered by the
            entropy of M), dropout (mean of M over its deviation), evidential (Dirichlet), and the controls random
            (soft, shuffled) and uniform (the mean of soft for each token)
        k: number of tokens that ``hard`` keeps
        compat: paper: as published. released: as in the authors' code, for their checkpoints
        draws: number of draws of the instruction for ``dropout``
        dropout: share of the instruction's channels that a draw of ``dropout`` sets to zero
    """

    mode: Literal[
        "soft", "hard", "none", "attention", "gate", "entropy", "dropout", "evidential", "random", "uniform"
    ] = "soft"
    k: int | None = None
    compat: Literal["paper", "released"] = "paper"
    draws: int = 8
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in PAPER_MODES + RIVAL_MODES:
            raise ValueError(
                f"belief.mode must be soft, hard or none, or one of {', '.join(RIVAL_MODES)}, not '{self.mode}'"
            )
        if self.compat not in ("paper", "released"):
            raise ValueError(f"belief.compat must be paper or released, not '{self.compat}'")
        if self.compat == "released" and self.mode in RIVAL_MODES:
            raise ValueError(f"belief.compat 'released' has no mode '{self.mode}': set belief.compat to paper")
        if self.mode == "hard" and (self.k is None or self.k < 1):
            raise ValueError(f"belief.mode 'hard' needs belief.k, the number of tokens to keep, not {self.k}")
        if self.draws < 2:
            raise ValueError(f"belief.draws must be at least 2, because a deviation is taken of them, not {self.draws}")
        if not 0 < self.dropout < 1:
            raise ValueError(f"belief.dropout must lie in (0, 1), not {self.dropout}")
