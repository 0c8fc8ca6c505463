"""Asks after each step whether any rank was told to stop, without a wait for the device.

    step      1       2       3
    vote      o-------o-------o       starts after its step; the device carries it out beside the next step
    answer            1       2       one step late; at once after a step whose results the processor waits for anyway

A rank that is told to stop stays told, so that an answer also holds for the steps after it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


class Vote:
    """One question to all ranks. It starts when it is made. A collective."""

    def __init__(self, flag: bool, device: torch.device) -> None:
        self.answer = torch.full((), float(flag), device=device)
        self.work = dist.all_reduce(self.answer, op=dist.ReduceOp.MAX, async_op=True)
        self.copied: torch.Event | None = None
        if device.type != "cpu":
            self.work.wait()  # only the device's stream waits
            on_device, self.answer = self.answer, torch.empty((), pin_memory=True)
            self.answer.copy_(on_device, non_blocking=True)
            self.copied = torch.Event(device)
            self.copied.record()

    def result(self) -> bool:
        """Whether any rank's flag was set. Waits until the device has come as far as this vote."""
        if self.copied is not None:
            self.copied.synchronize()
        else:
            self.work.wait()
        return bool(self.answer.item())


class StopVote:
    """The votes of a run, one at a time.

    Args:
        world_size: a single rank needs no vote
        device: of the collectives
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self.world_size, self.device = world_size, device
        self.running: Vote | None = None

    def ask(self, is_told: bool, at_once: bool) -> bool:
        """Starts a vote. Returns the answer to it, or to the vote before it, the same on all ranks. A collective.

        Args:
            is_told: whether this rank was told to stop
            at_once: wait for the answer to this vote; every rank passes the same value
        """
        if self.world_size == 1:
            return is_told
        before, self.running = self.running, Vote(is_told, self.device)
        if at_once:
            before, self.running = self.running, None
        return before is not None and before.result()
