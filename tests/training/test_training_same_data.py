"""If ranks see different shards, all end before the first step, and the message names the rank that differs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from priorclip.common.ports import free_port
from priorclip.data_shards.pack.write_shards import PackPlan, pack
from priorclip.data_shards.sources import synthetic

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys
import torch.distributed as dist
from priorclip.training.ranks.same_data import refuse_different_data
from priorclip.data_shards import ShardSet, ShardStream
from priorclip.data_shards.config import DataConfig

port, rank, whole, short = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
for shards, seed in ((whole, 7), (short if rank == 1 else whole, 7), (whole, 8 if rank == 2 else 7)):
    config = DataConfig(shards, workers=0)
    stream = ShardStream(ShardSet(shards), None, config, global_batch=6, rank=rank, world_size=3, seed=seed)
    try:
        refuse_different_data(stream)
        print("the same")
    except ValueError as error:
        print(error)
dist.destroy_process_group()
"""


def shards(folder: Path, count: int) -> Path:
    pack(synthetic(count, 0, 16), folder, PackPlan(prefix="s", shard_size=count))
    return folder


def test_a_rank_with_other_data_is_named_on_all_ranks(tmp_path: Path) -> None:
    whole, short = shards(tmp_path / "whole", 12), shards(tmp_path / "short", 11)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, port, str(rank), str(whole), str(short)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(3)
    ]  # fmt: skip
    outputs = []
    for process in ranks:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        outputs.append(output.strip().splitlines())
    assert outputs[0] == outputs[1] == outputs[2]
    same, other_shards, other_seed = outputs[0]
    assert same == "the same"
    for message, culprit, value in ((other_shards, 1, "batches an epoch 1, "), (other_seed, 2, "seed 8")):
        assert "do not stream the same data" in message
        named, usual = message.split(" differ from the others ")
        assert f"rank {culprit} on " in named
        assert value in named
        assert value not in usual
        assert message.count("rank ") == 1
