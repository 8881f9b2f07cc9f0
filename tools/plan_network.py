"""How long collectives take on a cluster of machines: the alpha–beta model, over two kinds of links.

A message of S bytes takes a link α + S/B: a latency, and the bytes at the link's bandwidth (Hockney 1994). A ring
all-reduce of n ranks has 2(n − 1) steps of S/n bytes (Thakur, Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009). In
machines of k ranks, m of them, it is done in and between them: reduced within each machine, all-reduced between the
machines by every rank on its share at once, and gathered within each machine again:

    all-reduce   2(k−1)/k · S/B_in + s(k) · α_in   +   2(m−1)/m · S/B_between + s(m) · α_between
    all-gather    (k−1)/k · S/B_in + (k−1) · α_in  +    (m−1)/m · S/B_between + (m−1) · α_between

B_between is a machine's, which its ranks share. s(n) = 2(n−1) steps in a ring, as gloo's; NCCL also has trees, of
2⌈log₂ n⌉ steps, and takes the better. An S of a few bytes costs the steps' latencies alone.

Shapes: n ranks, k of them on each of m machines; S bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

GBIT = 1e9 / 8  # bytes


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins two ranks."""

    latency_s: float
    """α, of one step."""
    bytes_per_sec: float
    """B, one way; `math.inf` is allowed."""

    def scaled(self, factor: float) -> Link:
        """The link over which everything takes `factor` times as long."""
        return Link(latency_s=factor * self.latency_s, bytes_per_sec=self.bytes_per_sec / factor)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The ranks' links."""

    inside: Link
    """Between ranks of one machine."""
    between: Link
    """Of a machine to the others; its ranks share it."""
    ranks_per_node: int
    """On each machine."""
    trees: bool
    """Whether small messages may go by trees (NCCL), or by rings alone (gloo)."""

    def shape(self, ranks: int) -> tuple[int, int]:
        """Ranks on a machine, and machines."""
        return min(ranks, self.ranks_per_node), math.ceil(ranks / self.ranks_per_node)

    def all_reduce_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds that the sum of `num_bytes` on each of so many ranks takes."""
        local, nodes = self.shape(ranks)
        return self._reduced(self.inside, num_bytes, local) + self._reduced(self.between, num_bytes, nodes)

    def latency_s(self, ranks: int) -> float:
        """Of an all-reduce of no bytes."""
        return self.all_reduce_s(0.0, ranks)

    def all_gather_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds until every rank has the `num_bytes` that all of them hold together."""
        local, nodes = self.shape(ranks)
        inside, between = _share(local) * num_bytes, _share(nodes) * num_bytes
        return (
            inside / self.inside.bytes_per_sec
            + (local - 1) * self.inside.latency_s
            + between / self.between.bytes_per_sec
            + (nodes - 1) * self.between.latency_s
        )

    def pass_around_s(self, num_bytes: float, ranks: int) -> float:
        """Seconds in which each rank's `num_bytes` pass all the others, one after the other."""
        _, nodes = self.shape(ranks)
        slowest = self.between if nodes > 1 else self.inside
        return (ranks - 1) * (slowest.latency_s + num_bytes / slowest.bytes_per_sec)

    def scaled(self, factor: float, *, ranks: int) -> Network:
        """The links over which everything among so many ranks takes `factor` times as long.

        Those between machines stay as they are where the ranks are all on one.
        """
        _, nodes = self.shape(ranks)
        return replace(
            self,
            inside=self.inside.scaled(factor),
            between=self.between.scaled(factor if nodes > 1 else 1.0),
        )

    def _reduced(self, link: Link, num_bytes: float, ranks: int) -> float:
        if ranks == 1:
            return 0.0
        ring = 2 * (ranks - 1)
        steps = min(ring, 2 * math.ceil(math.log2(ranks))) if self.trees else ring
        return 2 * _share(ranks) * num_bytes / link.bytes_per_sec + steps * link.latency_s


def _share(ranks: int) -> float:
    """Of a message that comes from the other ranks."""
    return (ranks - 1) / ranks


def usual_network(device: Literal["cpu", "cuda"], ranks_per_node: int) -> Network:
    """What is assumed of links that nobody measured or named.

    NVLink's bus bandwidth as nccl-tests prints it is 230 GB/s on A100 and above 360 on H100, of eight GPUs; 200 is
    taken, and 3 µs a step. Between machines 100 Gbit/s, 80 % of which arrive, and 10 µs. gloo between processes of one
    machine goes through its loopback: 1 GB/s and 40 µs; between machines 50 µs.
    """
    if device == "cuda":
        return Network(
            inside=Link(latency_s=3e-6, bytes_per_sec=200e9),
            between=Link(latency_s=10e-6, bytes_per_sec=80 * GBIT),
            ranks_per_node=ranks_per_node,
            trees=True,
        )
    return Network(
        inside=Link(latency_s=40e-6, bytes_per_sec=1e9),
        between=Link(latency_s=50e-6, bytes_per_sec=80 * GBIT),
        ranks_per_node=ranks_per_node,
        trees=False,
    )
