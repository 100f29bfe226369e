"""The linear programme that reads the spans off a network: one unit of flow on its cheapest path.

Knows networks and how to minimise over their flows; not where the networks come from, nor what their costs mean.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from lingualinked.errors import InfeasiblePlanError, LingualinkedError
from lingualinked.planning.placement.linear import INFEASIBLE, OPTIMAL, minimise
from lingualinked.planning.placement.network import Network
from lingualinked.planning.placement.problem import Floats, Placement, Span

MAX_ARCS = 4000
"""Arcs that a programme may have; HiGHS takes some 0.1 s for as many."""

TIGHT = 1e-11
"""Relative slack of an arc that counts as none: distances are sums of a few hundred terms, rounded at 1e-16 each."""

FEASIBILITY = 1e-10
"""The smallest tolerance that HiGHS takes; costs are scaled so that the optimum is 1."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Arcs:
    """Arcs between numbered nodes: ends ``[A, 2]``, costs ``[A]``, slacks ``[A]``, and whose span ``[A, 4]`` each is."""

    ends: NDArray[np.int64]
    cost: Floats
    slack: Floats
    span: NDArray[np.int64]


def solve_programme(networks: Sequence[Network]) -> Placement:
    """Find the cheapest placement of some networks by linear programming.

    Minimise ``sum_a c_a x_a`` over flows ``x >= 0`` with ``N x = b``, where N is the node-arc incidence matrix (1 in the
    row of an arc's tail, -1 in that of its head) and b is 1 at the source, -1 at the sink and 0 elsewhere. N is totally
    unimodular, so every vertex of the polytope is integral: the unit of flow runs along one path, and the arcs that
    carry it are the placement [1]_. The dual simplex method ends in a vertex.

    Where there are more than `MAX_ARCS` arcs, those that are worst by reduced cost are fixed to zero beforehand. The
    reduced costs are those of an optimal dual solution (the distances from the source and to the sink), so an arc of
    an optimal path has none, and fixing others cuts off no optimum.

    Parameters
    ----------
    networks : sequence of Network
        With additive costs, all in one programme: it chooses among the networks as well.

    Returns
    -------
    tuple of Span
        The arcs of the vertex that are spans, in pipeline order.

    Raises
    ------
    InfeasiblePlanError
        If no network has a path, or linprog finds no flow (status 2).
    LingualinkedError
        If linprog stops at a limit (status 1), finds the programme unbounded (3) or meets numerical difficulties (4),
        or if its solution is not integral: in exact arithmetic none can happen to a shortest path.

    References
    ----------
    .. [1] R. K. Ahuja, T. L. Magnanti, J. B. Orlin, "Network Flows: Theory, Algorithms, and Applications", Prentice
       Hall, 1993, chapters 4, 5 and 11.
    """
    values = [network.best() for network in networks]
    best = min(values, default=math.inf)
    if best == math.inf:
        raise InfeasiblePlanError("no placement: the network has no path from source to sink")
    winner = values.index(best)
    parts = [
        _arcs_of(network, number, networks[winner].shortest() if number == winner else None)
        for number, network in enumerate(networks)
        if values[number] < math.inf
    ]
    arcs = _Arcs(*(np.concatenate(columns) for columns in zip(*map(dataclasses.astuple, parts), strict=True)))
    if len(arcs.cost) > MAX_ARCS:
        keep = np.argpartition(arcs.slack, MAX_ARCS)[:MAX_ARCS]
        arcs = _Arcs(arcs.ends[keep], arcs.cost[keep], arcs.slack[keep], arcs.span[keep])
    chosen = arcs.span[_unit_flow(arcs, best if best > 0 else 1.0)]
    return _placement(chosen, networks)


def tight_networks(networks: Sequence[Network], second: Sequence[Network], best: float) -> list[Network]:
    """Keep of the second networks the arcs that lie on a cheapest path of the first.

    A path of such arcs is a cheapest path, and every cheapest path consists of them, so that minimising the second cost
    over what is kept breaks ties of the first.

    Parameters
    ----------
    networks, second : sequence of Network
        The same networks with two additive costs.
    best : float
        Least first cost.

    Returns
    -------
    list of Network
        With the second costs.
    """
    limit = best + TIGHT * abs(best)
    kept = []
    for network, other in zip(networks, second, strict=True):
        source, sink, span, hop = (lengths <= limit for lengths in _through(network))
        kept.append(
            dataclasses.replace(
                other,
                source=np.where(source, other.source, np.inf),
                sink=np.where(sink, other.sink, np.inf),
                span=np.where(span, other.span, np.inf),
                hop=np.where(hop.any(axis=2), other.hop, np.inf),
            )
        )
    return kept


def _through(network: Network) -> tuple[Floats, Floats, Floats, Floats]:
    """Length of the cheapest path through each arc: source, sink, span, and hop ``[n, n, L+1]``."""
    into_from, out_from = network.from_source()
    into_to, out_to = network.to_sink()
    return (
        network.source + into_to,
        out_from + network.sink,
        into_from[:, :, None] + network.span + out_to[:, None, :],
        out_from[:, None, :] + network.hop[:, :, None] + into_to[None, :, :],
    )


def _arcs_of(network: Network, number: int, path: Placement | None) -> _Arcs:
    source, sink, span, hop = lengths = _through(network)
    if path is not None:
        _protect(network, path, lengths)
    num_positions, num_nodes = network.source.shape
    base = 2 + number * 2 * 10**6  # a network has far fewer than a million nodes of a kind

    def node(position: NDArray[np.int64], layer: NDArray[np.int64], kind: int) -> NDArray[np.int64]:
        return np.asarray(base + 2 * (position * num_nodes + layer) + kind)

    assert num_positions * num_nodes < 10**6
    p, i = np.nonzero(np.isfinite(source))
    sources = (np.zeros_like(p), node(p, i, 0), network.source[p, i], source[p, i], _no_span(p))
    p, j = np.nonzero(np.isfinite(sink))
    sinks = (node(p, j, 1), np.ones_like(p), network.sink[p, j], sink[p, j], _no_span(p))
    p, i, j = np.nonzero(np.isfinite(span))
    span_columns = np.stack([np.full_like(p, number), p, i, j], axis=1)
    spans = (node(p, i, 0), node(p, j, 1), network.span[p, i, j], span[p, i, j], span_columns)
    p, q, i = np.nonzero(np.isfinite(hop))
    hops = (node(p, i, 1), node(q, i, 0), network.hop[p, q], hop[p, q, i], _no_span(p))
    tail, head, cost, slack, columns = (
        np.concatenate(parts) for parts in zip(sources, sinks, spans, hops, strict=True)
    )
    return _Arcs(np.stack([tail, head], axis=1), cost, slack, columns)


def _no_span(like: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.full((len(like), 4), -1)


def _protect(network: Network, path: Placement, lengths: tuple[Floats, Floats, Floats, Floats]) -> None:
    """Put the arcs of one cheapest path before all others, so that ties can't leave only pieces of paths."""
    source, sink, span, hop = lengths
    inner = path if network.ring is None else path[1:-1]
    positions = [network.devices.index(part.device) for part in inner]
    source[positions[0], inner[0].start] = sink[positions[-1], inner[-1].end] = -np.inf
    for position, part in zip(positions, inner, strict=True):
        span[position, part.start, part.end] = -np.inf
    for here, there, part in zip(positions, positions[1:], inner, strict=False):
        hop[here, there, part.end] = -np.inf
    for table in lengths:
        np.copyto(table, -1.0, where=np.isneginf(table))


def _unit_flow(arcs: _Arcs, scale: float) -> NDArray[np.int64]:
    """Solve the programme; give the arcs that carry the flow."""
    nodes, ends = np.unique(arcs.ends, return_inverse=True)
    ends = ends.reshape(arcs.ends.shape)
    num_arcs = len(arcs.cost)
    incidence = sparse.csr_matrix(
        (np.repeat([1.0, -1.0], num_arcs), (ends.T.ravel(), np.tile(np.arange(num_arcs), 2))),
        shape=(len(nodes), num_arcs),
    )
    supply = np.zeros(len(nodes))
    supply[0], supply[1] = 1.0, -1.0  # nodes 0 and 1 are source and sink
    answer = minimise(arcs.cost / scale, equal=[(incidence, supply)], tolerance=FEASIBILITY)
    if answer.status == INFEASIBLE:
        raise InfeasiblePlanError(f"no placement: linprog finds no flow from source to sink ({answer.message})")
    if answer.status != OPTIMAL:
        raise LingualinkedError(
            f"linprog stopped with status {answer.status} ({answer.message}) on a shortest path of {num_arcs} arcs; "
            "check the profile for costs that differ by more than ten orders of magnitude"
        )
    flow = answer.x
    carried = np.round(flow)
    if np.abs(flow - carried).max() > 1e-6:
        raise LingualinkedError(
            f"the vertex that linprog gives is not integral (off by {np.abs(flow - carried).max():.1e}); "
            "check the profile for costs that differ by more than ten orders of magnitude"
        )
    return np.flatnonzero(carried == 1)


def _placement(chosen: NDArray[np.int64], networks: Sequence[Network]) -> Placement:
    rows = sorted((int(start), int(end), int(p), int(number)) for number, p, start, end in chosen if number >= 0)
    network = networks[rows[0][3]]
    spans = [Span(network.devices[p], start, end) for start, end, p, _ in rows]
    if network.ring is not None:
        num_layers = network.source.shape[1] - 1
        device = network.ring.device
        spans = [Span(device, 0, network.ring.end), *spans, Span(device, spans[-1].end, num_layers)]
    return tuple(spans)
