"""Which process of an evaluation answers what."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """The processes that evaluate together: all ask for the same, each answers a share."""

    rank: int
    world_size: int
    gather: Callable[[object], list[object]]
    """Called by all with an object each: all objects, by rank, in every process"""

    @classmethod
    def alone(cls) -> Processes:
        """One process."""
        return cls(0, 1, lambda one: [one])


def deal(costs: Sequence[int], processes: int) -> list[list[int]]:
    """The numbers of the entries that each process takes, about the same cost for all; costly ones first.

    Every process that deals the same costs gets the same shares.
    """
    shares: list[list[int]] = [[] for _ in range(processes)]
    loads = [(0, rank) for rank in range(processes)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, rank = heapq.heappop(loads)
        shares[rank].append(number)
        heapq.heappush(loads, (load + costs[number], rank))
    return shares
