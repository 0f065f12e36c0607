"""Ctrl-C, caught by a script, at every point of a blocking call that an idle group performs in the caller's own thread."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hvdtrain.mpi import lane, submitting

_FILES = (lane.__file__, submitting.__file__)


class Interrupt:
    """Raises KeyboardInterrupt in this thread's way through the files, at one of the points where Python looks for signals."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0
        self._last: dict[FrameType, str] = {}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Interrupt | None:
        if frame.f_code.co_filename not in _FILES or frame.f_code.co_name in ("__init__", "finish"):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = self._last.get(frame, "RESUME")
            self._last[frame] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if before in ("RESUME", "CALL", "CALL_FUNCTION_EX", "JUMP_BACKWARD"):
                self.seen += 1
                if self.seen == self.at:
                    raise KeyboardInterrupt
        return self

    @contextmanager
    def expected(self) -> Iterator[None]:
        before = sys.gettrace()
        sys.settrace(self)
        try:
            yield
        finally:
            sys.settrace(before)


def quick(group: Any) -> None:
    """Let the next blocking call go the inline way, however slow the ones before were."""
    group._ways._by_lane = group._ways._slow = 0


def summed(group: Any, count: int) -> torch.Tensor:
    tensor = torch.ones(count)
    quick(group)
    dist.all_reduce(tensor, group=group)
    return tensor


@pytest.mark.parametrize("count", [1, 1000], ids=["in the question", "after the question"])
@pytest.mark.parametrize("known", [False, True])
def test_a_group_goes_on_or_says_why_not_wherever_a_call_was_interrupted(rank, size, count, known):
    if size > 2:
        pytest.skip("one rank and two are enough, and every point is tried")
    everyone = list(range(size))
    group = dist.new_group(everyone, timeout=timedelta(seconds=2))
    lost = went_on = 0
    for at in range(1, 2000):
        if known:
            summed(group, count)
        else:
            group._ways._passages.clear()
        before, interrupt = group._ways.asked, Interrupt(at if rank == 0 else 0)
        try:
            with interrupt.expected(), contextlib.suppress(dist.DistBackendError) if rank else contextlib.nullcontext():
                summed(group, count)
        except KeyboardInterrupt:
            if size > 1 and group._ways.asked == before:  # the others wait for it
                summed(group, count)
        over = rank == 0 and interrupt.seen < at
        state = [bool(over), group._lane.broken is not None]
        dist.broadcast_object_list(state, 0)
        if state[0]:
            break
        if state[1]:  # in the middle of asking: nobody knows whether the others have heard
            lost += 1
            if rank == 0:
                with pytest.raises(dist.DistBackendError, match=r"was interrupted \(KeyboardInterrupt\)"):
                    summed(group, count)
            group.abort()
            group = dist.new_group(everyone, timeout=timedelta(seconds=2))
            continue
        went_on += 1
        assert summed(group, count).tolist() == [size] * count
        assert dist.all_reduce(torch.ones(2), group=group, async_op=True).wait()
    assert went_on > 10
    assert lost < went_on
    dist.destroy_process_group(group)
