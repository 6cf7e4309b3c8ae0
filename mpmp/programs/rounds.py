"""One round of all ranks at once: who meets whom, over which link, and when everybody is through.

Programs speak to the same peers for many rounds, so a meeting is worked out once and used again
until the peers change; what is left of a round is a handful of operations on vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpmp.errors import ProgramError
from mpmp.programs.cluster import Cluster, Link
from mpmp.programs.steps import NONE, Reduce, Round, Send, Step
from mpmp.programs.windows import Combine, Load

Vector = NDArray[Any]
Number = Any
"""One number for all messages, or a vector of one each."""

# Pipelines go to and fro between a few sets of peers.
_REMEMBERED = 4


class Chunks:
    """The bytes of spans of chunks: ``nbytes`` cut into ``parts`` as ``partition`` cuts them.

    ``copies`` buffers of that many bytes lie one after another, each cut the same way.
    """

    def __init__(self, nbytes: int, parts: int, copies: int = 1) -> None:
        self.length, self.longer = divmod(nbytes, parts)
        self.parts, self.copies = parts, copies

    def bytes_of(self, step: Step | Combine | Load, ranks: Vector | None = None) -> Number:
        """Bytes that a step moves on ``ranks`` (None: on all)."""
        chunk, count = step.chunk, step.count
        if ranks is not None:
            chunk, count = _at(chunk, ranks), _at(count, ranks)
        found = count * self.length
        if self.longer:
            if self.copies > 1:
                chunk = chunk % self.parts
            # The first ``longer`` chunks have a byte more.
            if np.ndim(count) == 0 and count == 1:
                return found + (chunk < self.longer)
            found = found + np.minimum(np.maximum(self.longer - chunk, 0), count)
        return found


def _at(values: Number, ranks: Vector) -> Number:
    return values if np.ndim(values) == 0 else values[ranks]


class Rounds:
    """The clock of all ranks: ``play`` a program's rounds, then read ``now``."""

    def __init__(self, size: int, network: Link | Cluster, hosts: Sequence[int]) -> None:
        self.now = np.zeros(size)
        self._ranks = np.arange(size)
        self._network = network
        self._hosts = np.asarray(hosts)
        self._meetings: list[Meeting] = []

    def play(self, number: int, one: Round, chunks: Chunks) -> None:
        """Let the round with this number begin at ``now``, and put ``now`` to its end."""
        sends = [step.to for step in one.steps if isinstance(step, Send)]
        puts = [step for step in one.steps if not isinstance(step, Send)]
        sources = [put.source for put in puts]
        for meeting in self._meetings:
            if meeting.is_between(sends, sources):
                break
        else:
            meeting = Meeting(number, sends, sources, self._ranks)
            meeting.travel(self._network, self._hosts)
            self._meetings = [meeting, *self._meetings[: _REMEMBERED - 1]]
        if not meeting.waves:
            return
        if meeting.is_permutation:
            self._swap(meeting, puts[0], chunks)
        else:
            self._meet(meeting, puts, chunks)

    def _swap(self, meeting: Meeting, put: Step, chunks: Chunks) -> None:
        """Every rank sends one step and takes one in: messages are numbered by their receiver."""
        nbytes = chunks.bytes_of(put)
        arrival = np.maximum(self.now.take(meeting.sender), self.now)
        arrival += meeting.alpha + nbytes * meeting.beta
        np.maximum(arrival, arrival.take(meeting.receiver_of), out=self.now)
        if isinstance(put, Reduce):
            self.now += nbytes * meeting.gamma

    def _meet(self, meeting: Meeting, puts: list[Any], chunks: Chunks) -> None:
        nbytes, combining = np.zeros(len(meeting.sender)), np.zeros(len(self.now))
        for put, (receivers, messages) in zip(puts, meeting.parts, strict=True):
            moved = chunks.bytes_of(put, receivers)
            nbytes[messages] += moved
            if isinstance(put, Reduce):
                combining[receivers] += moved * _at(meeting.gamma, messages)
        takes = meeting.alpha + nbytes * meeting.beta
        out_free, in_free = self.now.copy(), self.now.copy()
        for wave in meeting.waves:
            sender, receiver = meeting.sender[wave], meeting.receiver[wave]
            arrival = np.maximum(out_free[sender], in_free[receiver]) + takes[wave]
            out_free[sender] = in_free[receiver] = arrival
        self.now = np.maximum(out_free, in_free) + combining


class Meeting:
    """Which send meets which receive where the steps of a round have these peers.

    Messages stand in the order in which they use the ports: as the receiver lists them, then as
    the sender does. A *wave* is a run of them in which no rank sends or receives twice. ``parts``
    has for every receiving step its ranks and the messages that they take part of.
    """

    def __init__(
        self, number: int, sends: list[Number], sources: list[Number], ranks: Vector
    ) -> None:
        self._peers = (sends, sources)
        size = len(ranks)
        self.is_permutation = self._is_permutation(ranks)
        if self.is_permutation:
            self.sender, self.receiver_of, self.receiver = sources[0], sends[0], ranks
            self.waves, self.parts = [slice(0, size)], []
            return
        out_live = [np.flatnonzero(np.broadcast_to(to, size) != NONE) for to in sends]
        in_live = [np.flatnonzero(np.broadcast_to(source, size) != NONE) for source in sources]
        outs = [live * size + _at(to, live) for live, to in zip(out_live, sends, strict=True)]
        ins = [
            _at(source, live) * size + live for live, source in zip(in_live, sources, strict=True)
        ]
        keys, first_in, message, num_in = _unique(ins)
        out_keys, first_out, _, num_out = _unique(outs)
        if not (np.array_equal(keys, out_keys) and np.array_equal(num_in, num_out)):
            _refuse(number, (keys, num_in), (out_keys, num_out), size)
        place = first_in * max(len(sends), 1) + first_out
        order = np.argsort(place, kind="stable")
        keys, place = keys[order], place[order]
        self.sender, self.receiver = keys // size, keys % size
        bounds = [0, *(np.flatnonzero(np.diff(place)) + 1).tolist(), len(place)]
        self.waves = [slice(*pair) for pair in zip(bounds, bounds[1:], strict=False) if len(place)]
        numbered = np.empty_like(order)
        numbered[order] = np.arange(len(order))
        ends = np.cumsum([0, *map(len, ins)])
        self.parts = [
            (live, numbered[message[start:end]])
            for live, start, end in zip(in_live, ends, ends[1:], strict=False)
        ]

    def _is_permutation(self, ranks: Vector) -> bool:
        sends, sources = self._peers
        if len(sends) != 1 or len(sources) != 1:
            return False
        to, source = sends[0], sources[0]
        if np.shape(to) != ranks.shape or np.shape(source) != ranks.shape:
            return False
        alive = to.min() >= 0 and source.min() >= 0
        return bool(alive and (source[to] == ranks).all() and (to[source] == ranks).all())

    def is_between(self, sends: list[Number], sources: list[Number]) -> bool:
        """Whether the steps of another round have the same peers."""
        return all(
            len(mine) == len(theirs)
            and all(a is b or np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(self._peers, (sends, sources), strict=True)
        )

    def travel(self, network: Link | Cluster, hosts: Vector) -> None:
        """Set what a message, a byte and a byte combined take, of each message."""
        if isinstance(network, Link):
            self.alpha: Number = network.alpha_s
            self.beta: Number = network.beta_s_per_byte
            self.gamma: Number = network.gamma_s_per_byte
            return
        near, far = network.same_host, network.other_host
        leaves, enters = hosts[self.sender], hosts[self.receiver]
        crosses = leaves != enters
        pairs = self.sender[crosses], self.receiver[crosses]
        crowd = np.maximum(
            _at_once(leaves[crosses], *pairs, hosts)[leaves],
            _at_once(enters[crosses], *pairs, hosts)[enters],
        )
        share = np.maximum(1.0, crowd / network.rails)
        self.alpha = np.where(crosses, far.alpha_s, near.alpha_s)
        self.beta = np.where(crosses, far.beta_s_per_byte * share, near.beta_s_per_byte)
        self.gamma = np.where(crosses, far.gamma_s_per_byte, near.gamma_s_per_byte)


def _unique(keys: list[Vector]) -> tuple[Vector, Vector, Vector, Vector]:
    """Of the pairs in all steps: each once, the step it is first in, its number, how often."""
    step = np.repeat(np.arange(len(keys)), [len(one) for one in keys])
    joined = np.concatenate(keys) if keys else np.empty(0, int)
    found, first, number, often = np.unique(
        joined, return_index=True, return_inverse=True, return_counts=True
    )
    return found, step[first], number, often


def _at_once(at: Vector, sender: Vector, receiver: Vector, hosts: Vector) -> Vector:
    """How many messages can be under way at once at each host; ``at`` is the host of each message.

    A rank has one port: as many as different ranks send them, or take them in if those are fewer.
    """
    num_hosts, size = int(hosts.max()) + 1, len(hosts)
    ends = [
        np.bincount(np.unique(at * size + rank) // size, minlength=num_hosts)
        for rank in (sender, receiver)
    ]
    return np.minimum(*ends)


def _refuse(
    number: int, ins: tuple[Vector, Vector], outs: tuple[Vector, Vector], size: int
) -> None:
    """Name the first rank that has a step without a partner."""
    taken, sent = (dict(zip(*map(np.ndarray.tolist, side), strict=True)) for side in (ins, outs))
    lonely = []
    for key in taken.keys() | sent.keys():
        sender, receiver = divmod(key, size)
        if sent.get(key, 0) > taken.get(key, 0):
            lonely.append((sender, "sends to", receiver))
        elif sent.get(key, 0) < taken.get(key, 0):
            lonely.append((receiver, "receives from", sender))
    rank, does, peer = min(lonely)
    raise ProgramError(
        f"rank {rank}, round {number}: {does} rank {peer}, which has no partner for it; "
        "check the program before it is simulated"
    )
