"""Imported by the fork server that decoding workers come from (see workers.py), and by nothing else.

SLURM announces preemption and the end of a time limit by SIGTERM or SIGUSR1 to the whole process group. The training
process answers with a checkpoint; its workers must live on until then, and so must the fork server, whose death they
would take for the end of the run. They end when the training process tells them to, or when it is gone.
"""

from __future__ import annotations

# Loaded once here, with torch, so that workers start at once.
from transformers import PreTrainedTokenizerFast  # noqa: F401

import priorclip.data_shards.stream.batch_fetcher  # noqa: F401
from priorclip.data_shards.stream.workers import ignore_preemption_signals

ignore_preemption_signals(0)
