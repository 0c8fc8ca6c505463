"""Only the fork server of the decoding workers imports this module (see workers.py).

SLURM announces preemption and the end of a time limit by SIGTERM or SIGUSR1 to the whole process group. The training
process then writes a checkpoint. Its workers must live until then, and so must the fork server, because workers end
with it. They end when the training process stops them, or when it ends (common/processes.py).
"""

from __future__ import annotations

import atexit
import os

# Imported once here, with torch, so that workers start fast.
from transformers import PreTrainedTokenizerFast  # noqa: F401

import priorclip.common.forkserver_guard
import priorclip.data_shards.stream.batch_fetcher  # noqa: F401
from priorclip.data_shards.stream.workers import ignore_preemption_signals

SERVER = os.getpid()


def end_at_once() -> None:
    """Ends the fork server without the clean-up of torch, which takes seconds. Workers have an end of their own."""
    if os.getpid() == SERVER:
        os._exit(0)


ignore_preemption_signals(0)
atexit.register(end_at_once)
