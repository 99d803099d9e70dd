"""Messages between pipeline stages: a channel for each directed edge and kind of message.

Every channel has a communicator of its own, so it is first in, first out and independent of all others: two stages that
send to each other at the same moment cannot block each other, which one shared communicator allows. Sending never
waits; a receive is posted when the schedule says so, and waited for by whoever needs it. In which order messages travel
is decided by `schedule`, and proved there to be the same on both ends.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from internlm_ds.parallel.context import ParallelContext

ACTIVATION, GRADIENT = "activation", "gradient"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8)
# of a message: whether it is a bare tensor, number of tensors, then for each its dtype, number of dimensions and sizes
HEADER_NUMEL = 64

Value = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class MessageSpec:
    """What a receiver must know before a message comes.

    Attributes:
        tensors: Shape and dtype of each.
        bare: It stands for one tensor, not for a tuple of one.
    """

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    bare: bool = False

    @classmethod
    def of(cls, value: Value) -> MessageSpec:
        """Of what a layer returned."""
        return cls(tuple((tuple(t.shape), t.dtype) for t in as_tuple(value)), torch.is_tensor(value))

    @property
    def gradient(self) -> MessageSpec:
        """Of the message that comes back: a gradient for every floating tensor."""
        return MessageSpec(tuple((shape, dtype) for shape, dtype in self.tensors if dtype.is_floating_point))


@dataclass(frozen=True)
class Incoming:
    """A message that may still be on its way."""

    tensors: tuple[torch.Tensor, ...]
    pending: tuple[dist.Work, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors, filled (on a GPU: for what the current stream does from now on)."""
        for work in self.pending:
            work.wait()
        return self.tensors


@dataclass(frozen=True)
class _Link:
    """This rank's end of a channel: the group, and the global rank at the other end."""

    group: dist.ProcessGroup
    peer: int


@dataclass
class _Sent:
    """A message that is kept until the network has it."""

    key: Hashable
    tensors: tuple[torch.Tensor, ...]
    pending: list[dist.Work]

    def wait(self) -> None:
        for work in self.pending:
            work.wait()


class Channels:
    """This rank's ends of the channels of its pipeline. Collective: every rank of the job makes one.

    Args:
        context: Where this process stands; `pipe.size` is at least 2.
        ring: The last stage sends activations to the first, which continues with its next chunk.
    """

    def __init__(self, context: ParallelContext, *, ring: bool):
        self._device = context.device
        self._out: dict[str, _Link] = {}
        self._in: dict[str, _Link] = {}
        self._sent: deque[_Sent] = deque()
        # messages since the start, by kind
        self.num_sent: Counter[str] = Counter()
        lines = {kind: _pipe_group(context) for kind in (ACTIVATION, GRADIENT)}
        rings = {kind: _pipe_group(context) for kind in (ACTIVATION, GRADIENT)} if ring else {}
        (ranks,) = (group for group in context.layout.pipe_groups if context.rank in group)
        for earlier, later in pairwise(ranks):
            self._open(lines, earlier, later, rank=context.rank)
        if ring:
            self._open(rings, ranks[-1], ranks[0], rank=context.rank)

    def _open(self, groups: dict[str, dist.ProcessGroup], earlier: int, later: int, *, rank: int) -> None:
        """The two channels between two neighbours, if this rank is one of them."""
        if rank not in (earlier, later):
            return
        for kind, source, target in ((ACTIVATION, earlier, later), (GRADIENT, later, earlier)):
            ends, peer = (self._out, target) if rank == source else (self._in, source)
            ends[kind] = _Link(groups[kind], peer)
            # NCCL makes the communicator with the first message and holds both ends meanwhile: now it can do no harm
            first = torch.zeros(1, device=self._device)
            if rank == source:
                dist.send(first, target, group=groups[kind])
            else:
                dist.recv(first, source, group=groups[kind])

    def send(self, kind: str, tensors: Sequence[torch.Tensor], *, key: Hashable) -> None:
        """Put a message on its way. `key` names it for `arrived`."""
        link = self._out[kind]
        sent = tuple(tensor.detach().contiguous() for tensor in tensors)
        self._sent.append(_Sent(key, sent, [dist.isend(t, link.peer, group=link.group) for t in sent]))
        self.num_sent[kind] += 1
        self._forget_done()

    def receive(self, kind: str, spec: MessageSpec) -> Incoming:
        """Post the receive of the channel's next message."""
        link = self._in[kind]
        tensors = tuple(torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in spec.tensors)
        return Incoming(tensors, tuple(dist.irecv(t, link.peer, group=link.group) for t in tensors))

    def send_spec(self, kind: str, spec: MessageSpec) -> None:
        """Say what the next message looks like; the receiver calls `receive_spec` at the same place."""
        numbers = [int(spec.bare), len(spec.tensors)]
        for shape, dtype in spec.tensors:
            numbers += [DTYPES.index(dtype), len(shape), *shape]
        assert len(numbers) <= HEADER_NUMEL, f"too many numbers describe a message: {spec}"
        header = torch.tensor(numbers + [0] * (HEADER_NUMEL - len(numbers)), device=self._device)
        link = self._out[kind]
        self._sent.append(_Sent(None, (header,), [dist.isend(header, link.peer, group=link.group)]))

    def receive_spec(self, kind: str) -> MessageSpec:
        """What the channel's next message looks like; waits for it."""
        link = self._in[kind]
        header = torch.zeros(HEADER_NUMEL, dtype=torch.int64, device=self._device)
        dist.recv(header, link.peer, group=link.group)
        numbers = iter(header.tolist())
        bare, count = bool(next(numbers)), next(numbers)
        tensors = []
        for _ in range(count):
            dtype, dims = DTYPES[next(numbers)], next(numbers)
            tensors.append((tuple(next(numbers) for _ in range(dims)), dtype))
        return MessageSpec(tuple(tensors), bare)

    def arrived(self, key: Hashable) -> None:
        """The message `key` was answered, so it has arrived: free its tensors now."""
        for sent in self._sent:
            if sent.key == key:
                sent.wait()
                self._sent.remove(sent)
                return

    def finish(self) -> None:
        """Wait until everything that was sent has arrived."""
        while self._sent:
            self._sent.popleft().wait()

    def _forget_done(self) -> None:
        """Free what the network has taken. (gloo only knows after a wait: there `arrived` and `finish` do it.)"""
        while self._sent and all(work.is_completed() for work in self._sent[0].pending):
            self._sent.popleft()


def _pipe_group(context: ParallelContext) -> dist.ProcessGroup:
    """One more group of this rank's pipeline; in it every pair of ranks gets a communicator of its own.

    One group each for activations and gradients is enough on a line, where neighbours exchange each in one direction
    only. The ring's edge has others: between two stages it runs beside the line's, against it.
    """
    mine = None
    for ranks in context.layout.pipe_groups:
        group = dist.new_group(list(ranks))
        if context.rank in ranks:
            mine = group
    assert mine is not None, f"rank {context.rank} is in no pipeline of {context.layout}"
    return mine


def as_tuple(value: Value) -> tuple[torch.Tensor, ...]:
    """What layers pass on as a tuple."""
    return (value,) if torch.is_tensor(value) else tuple(value)
