"""Parts of a program that are computed once more in the backward, so that less is kept till then.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the work is done by
`torch.utils.checkpoint`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from cgo.runtime.fused_norms import trained, trained_copying
from cgo.runtime.operators import batch_norm, batch_norm_copying


def recomputing(graph: fx.Graph) -> Callable[..., Sequence[Tensor]]:
    """A graph as a function of its placeholders that keeps little for the backward.

    Its calls are divided into segments, about as many as each has calls, so that what is kept
    grows with the root of their number. Only values that a later segment reads are kept; the
    others are computed anew, with the same bits. Running statistics are updated once.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    segments = [_Segment(calls[start:stop]) for start, stop in pairwise(_borders(calls))]
    given = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.nodes if node.op == "output")
    last = _last_reads(segments)

    def run(*values: Any) -> Sequence[Tensor]:
        env: dict[fx.Node, Any] = dict(zip(given, values))
        leaving = set(output.all_input_nodes)
        for index, segment in enumerate(segments):
            env |= zip(segment.gives, segment(*(env[node] for node in segment.reads)))
            for node in last[index]:
                if node not in leaving:
                    del env[node]
        found: Sequence[Tensor] = fx.node.map_arg(output.args[0], env.__getitem__)
        return found

    return run


def _borders(calls: Sequence[fx.Node]) -> list[int]:
    """Where segments begin, and the end: about evenly, where fewest values cross."""
    crossing = _crossing(calls)
    length = max(1, math.ceil(math.sqrt(len(calls))))
    found = [0]
    for middle in range(length, len(calls), length):
        near = range(
            max(middle - length // 2, found[-1] + 1), min(middle + length // 2, len(calls))
        )
        found.append(min(near, key=crossing.__getitem__, default=middle))
    return [*found, len(calls)]


def _crossing(calls: Sequence[fx.Node]) -> list[int]:
    """Before each call, how many values of earlier calls are still to be read."""
    place = {node: index for index, node in enumerate(calls)}
    changes = [0] * (len(calls) + 1)
    for index, node in enumerate(calls):
        readers = [place.get(user, len(calls) - 1) for user in node.users]
        if readers:
            changes[index + 1] += 1
            changes[max(readers) + 1] -= 1
    return list(accumulate(changes))


#: What is computed once more, without the hidden write.
_WITHOUT_WRITING = {batch_norm: batch_norm_copying, trained: trained_copying}


class _Segment:
    """Some calls that stand together, as a function that is run once more in the backward."""

    def __init__(self, calls: Sequence[fx.Node]) -> None:
        own = set(calls)
        read = dict.fromkeys(node for call in calls for node in call.all_input_nodes)
        self.reads = [node for node in read if node not in own]
        self.gives = [node for node in calls if any(user not in own for user in node.users)]
        self._first = self._written(calls, {})
        # The hidden write of running statistics must not happen twice; results do not read them.
        self._again = self._written(calls, _WITHOUT_WRITING)

    def _written(self, calls: Sequence[fx.Node], instead: Mapping[Any, Any]) -> fx.GraphModule:
        graph, copies = fx.Graph(), {}
        for node in self.reads:
            copies[node] = graph.placeholder(node.name)
        for node in calls:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].target = instead.get(node.target, node.target)
        graph.output(tuple(copies[node] for node in self.gives))
        return fx.GraphModule(torch.nn.Module(), graph)

    def __call__(self, *values: Any) -> Sequence[Any]:
        turns = [self._first]

        def function(*given: Any) -> Any:
            return (turns.pop() if turns else self._again)(*given)

        # Random tensors are drawn before the step, so there is no stream to be set back.
        results: Sequence[Any] = checkpoint(
            function, *values, use_reentrant=False, preserve_rng_state=False
        )
        return results


def _last_reads(segments: Sequence[_Segment]) -> list[list[fx.Node]]:
    """Of each segment, the values that no later one reads."""
    found: list[list[fx.Node]] = [[] for _ in segments]
    last = {node: index for index, s in enumerate(segments) for node in (*s.gives, *s.reads)}
    for node, index in last.items():
        found[index].append(node)
    return found
