"""Weights on the nodes of a machine with several: modes, where slices are cut, who has room.

Modes: ``replicate`` keeps a copy on each node. ``shard`` keeps one in all: each node has a slice of the
intermediate dimension of feed-forward blocks, some heads of attention, some rows of other matrices.
``interleave`` alternates pages between nodes, ``node:N`` keeps all on one, ``none`` leaves pages where they
are first written. ``auto`` takes the first of replicate, shard, interleave and none that there is room for:
they are in the order of `bandwidth_share`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hybrid.errors import ConfigError

MODES = ("auto", "none", "replicate", "shard", "interleave", "node:N")
BLOCK_COLS = 256  # what a slice of the intermediate dimension has whole numbers of, but for the last
GROUP_ROWS = 16
REMOTE_EFFICIENCY = 0.5  # of reads from another node
FEED_FORWARD = ("routed_experts", "shared_experts", "dense_ffn")
_NODE = re.compile(r"node:[0-9]{1,3}")


def check_mode(mode: str, name: str) -> str:
    """``mode`` if it is one.

    Raises:
        ConfigError: it is not; the message begins with ``name``.
    """
    if mode not in MODES[:-1] and not _NODE.fullmatch(mode):
        raise ConfigError(f"{name}: expected {', '.join(MODES[:-1])} or node:N, found {mode!r}")
    return mode


def bandwidth_share(mode: str, num_nodes: int) -> float:
    """Of the read bandwidth of all nodes together, what weights in a mode are expected to be read at.

    Copies and slices are read from the node itself. Pages that alternate, or lie where any worker wrote
    them first, are on another node but for one in ``num_nodes``; one node's memory is one node's speed.
    """
    if mode in ("replicate", "shard") or num_nodes == 1:
        return 1.0
    if node_of(mode) is not None:
        return 1 / num_nodes
    return 1 / (1 / num_nodes + (num_nodes - 1) / num_nodes / REMOTE_EFFICIENCY)


def node_of(mode: str) -> int | None:
    """The node of ``node:N``."""
    return int(mode.partition(":")[2]) if mode.startswith("node:") else None


@dataclass(frozen=True)
class Workers:
    """Threads of a pool: the CPU of each, and its group, which are the nodes ``nodes`` in order.

    ``cpus`` is empty where there are more threads than CPUs: then nothing is bound and there is one group.
    """

    cpus: list[int]
    groups: list[int]
    nodes: list[int]


def spread(
    cores: Mapping[int, Sequence[int]], cpus: Mapping[int, Sequence[int]], num_threads: int
) -> Workers:
    """Threads over the nodes in turn, as far as each has cores; hyperthreads where cores do not suffice.

    Args:
        cores: node -> a CPU of each of its physical cores.
        cpus: node -> all its CPUs that may be used.
    """
    others = {node: [cpu for cpu in cpus[node] if cpu not in cores[node]] for node in cores}
    for places in (cores, {node: [*cores[node], *others[node]] for node in cores}):
        if num_threads <= sum(map(len, places.values())):
            break
    else:
        return Workers([], [], [])
    taken: dict[int, int] = dict.fromkeys(places, 0)
    left = num_threads
    while left:
        for node in sorted(places):
            if left and taken[node] < len(places[node]):
                taken[node] += 1
                left -= 1
    nodes = [node for node in sorted(taken) if taken[node]]
    return Workers(
        [cpu for node in nodes for cpu in places[node][: taken[node]]],
        [group for group, node in enumerate(nodes) for _ in range(taken[node])],
        nodes,
    )


def cuts(length: int, num_parts: int, step: int) -> list[int] | None:
    """Where ``length`` is cut into parts of whole steps, the larger ones first; ``None``: too few steps.

    ``cuts(768, 2, 256) == [0, 512, 768]``
    """
    steps = -(-length // step)
    if steps < num_parts:
        return None
    ends = [-(-steps * part // num_parts) * step for part in range(1, num_parts)]
    return [0, *ends, length]


@dataclass(frozen=True)
class Layout:
    """How a matrix stack ``[batch, rows, cols]`` lies: the arguments of `hybrid.kernels.cpu.PackedMatrix`."""

    division: str = "none"
    nodes: tuple[int, ...] = ()
    cuts: tuple[int, ...] = ()


def layout(mode: str, side: str, shape: tuple[int, int, int], nodes: Sequence[int]) -> Layout:
    """The layout of a matrix for a mode.

    Args:
        mode: one of `MODES`, not ``auto``.
        side: what ``shard`` cuts: ``hidden_rows`` and ``hidden_cols`` are the intermediate dimension of gate
            and up, and of down; ``heads``; or ``rows``.
        nodes: those with workers. Shards and copies are for them.

    Returns:
        One piece on the first node where ``shard`` finds too few heads or rows to cut.
    """
    node = node_of(mode)
    if node is not None:
        return Layout("none", (node,))
    if mode == "none" or len(nodes) < 2:
        return Layout()
    if mode == "interleave":
        return Layout("none", tuple(nodes))
    if mode == "replicate":
        return Layout("copies", tuple(nodes))
    batch, rows, cols = shape
    ways = {
        "hidden_rows": [("rows", cuts(rows, len(nodes), BLOCK_COLS))],
        "hidden_cols": [("cols", cuts(cols, len(nodes), BLOCK_COLS))],
        "heads": [("batch", cuts(batch, len(nodes), 1)), ("rows", cuts(rows, len(nodes), GROUP_ROWS))],
        "rows": [("rows", cuts(rows, len(nodes), GROUP_ROWS))],
    }
    for division, found in ways[side]:
        if found is not None:
            return Layout(division, tuple(nodes), tuple(found))
    return Layout("none", (nodes[0],))


def side_of(name: str, role: str) -> str:
    """What ``shard`` cuts of a tensor."""
    if role in FEED_FORWARD:
        return "hidden_cols" if ".ffn_down" in name else "hidden_rows"
    if any(f".{kind}." in name for kind in ("attn_k_b", "attn_v_b", "attn_kv_b")):
        return "heads"
    return "rows"


def shard_problem(role: str, side: str, parts: Sequence[tuple[int, int, int]], num_nodes: int) -> str | None:
    """Why a feed-forward tensor cannot be cut for so many nodes; ``None``: it can."""
    if role not in FEED_FORWARD or not parts:
        return None
    width = parts[0][2] if side == "hidden_cols" else parts[0][1]
    if cuts(width, num_nodes, BLOCK_COLS) is not None:
        return None
    blocks = -(-width // BLOCK_COLS)
    return (
        f"shard cuts the intermediate dimension in blocks of {BLOCK_COLS}, and its {width} have {blocks} "
        f"for {num_nodes} nodes; take replicate, interleave or node:N"
    )


def bytes_by_node(
    mode: str, side: str, parts: Sequence[tuple[int, int, int]], n_bytes: int, nodes: Sequence[int]
) -> Iterator[tuple[int, int]]:
    """(node, bytes) of a tensor whose copies take ``n_bytes`` together; nothing where no node is bound."""
    found = layout(mode, side, parts[0], nodes) if parts else Layout()
    if not found.nodes:
        return
    if not found.cuts:
        for node in found.nodes:
            yield node, n_bytes // len(found.nodes)
        return
    for node, start, end in zip(found.nodes, found.cuts, found.cuts[1:], strict=False):
        yield node, n_bytes * (end - start) // found.cuts[-1]
