"""``python run_module.py MODULE ARGS``: ``python -m MODULE ARGS`` for launchers that start script files only.

DeepSpeed's SLURM launcher drops its ``--module``; ``cluster launch --launcher slurm`` passes this file instead.
"""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = os.getcwd()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
