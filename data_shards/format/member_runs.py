"""Joins the members of a sample that lie beside each other in a tar, so that one read gets all of them."""

from __future__ import annotations

from collections.abc import Sequence

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.format.shard_index import Member
from priorclip.data_shards.format.tar import BLOCK, MAX_TAR

READ_OVER = 1 << 16  # bytes between two members; reading them is cheaper than a second read
MAX_MEMBER = 1 << 30  # bytes; no sample is larger, so a larger size means a damaged index or header


def byte_range(run: Sequence[Member]) -> tuple[int, int]:
    """Returns (offset, length) of adjacent members, with the header of the first."""
    start = run[0].offset - BLOCK
    return start, run[-1].offset + run[-1].size - start


def adjacent_runs(members: Sequence[Member]) -> list[list[Member]]:
    """Returns the members of a sample, sorted by offset, in runs with at most READ_OVER bytes between two members."""
    runs: list[list[Member]] = []
    end, left = -1, MAX_MEMBER
    for member in sorted(members, key=lambda member: member.offset):
        left -= member.size
        if left < 0 or not BLOCK <= member.offset <= MAX_TAR:
            raise BadSample("member is too large", f".{member.extension} has {member.size} bytes at {member.offset}")
        if runs and member.offset - end <= READ_OVER:
            left -= max(0, member.offset - end)
            runs[-1].append(member)
        else:
            runs.append([member])
        end = member.offset + member.size
    return runs
