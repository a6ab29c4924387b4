"""CUDA graphs as torch 2.11 has them, on a machine without CUDA: what captures leave behind.

Seen on a device and read off the library: a capture that ends in an error leaves the generators
that were registered with it, and the default one, in capture mode, where later draws outside of
graphs raise. One that ends well tells them. Streams hold still while somebody captures on them;
whoever waits for the device meanwhile ends the capture.
"""

import contextlib
from types import SimpleNamespace

import torch


class Generator:
    """What a capture does to a generator of a device."""

    def __init__(self):
        self.capturing = False

    def draw(self, cuda):
        if self.capturing and cuda.capture is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


class Graph:
    def __init__(self, cuda):
        self._cuda, self.generators, self.ended = cuda, [], False

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def pool(self):
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._cuda.pools

    def replay(self):
        assert self.ended


class FakeCuda:
    """Stands in for `torch.cuda`; its one device is called `device`."""

    def __init__(self):
        self.default = Generator()
        self.capture = None  # the graph that is being captured, on which stream
        self.broken = False  # what was done meanwhile has ended the capture
        self.refuses = ""  # what each capture says when it begins
        self.pools = 0
        self.current = SimpleNamespace(name="main")

    def install(self, monkeypatch):
        for name in ("CUDAGraph", "Stream", "current_stream", "device", "graph", "synchronize",
                     "graph_pool_handle", "stream", "is_current_stream_capturing"):  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"_{name}"))
        return self

    def read(self):
        """Look at a value: waits for the device."""
        if self.capture is not None:
            self.broken = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def _CUDAGraph(self):
        return Graph(self)

    def _Stream(self, device, priority=0):
        assert device.index is not None
        return SimpleNamespace(name="side")

    def _current_stream(self, device=None):
        return self.current

    def _synchronize(self, device=None):
        self.read()

    def _graph_pool_handle(self):
        self.pools += 1
        return self.pools

    def _is_current_stream_capturing(self):
        return self.capture is not None

    def _device(self, device):
        assert device.index is not None
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def _stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _graph(self, graph, pool=None, stream=None, capture_error_mode="global"):
        if self.refuses:
            raise RuntimeError(self.refuses)
        told = [self.default, *graph.generators]
        before, self.current, self.capture, self.broken = self.current, stream, graph, False
        for generator in told:
            generator.capturing = True
        try:
            yield
        finally:
            self.capture = None
            if self.broken:  # `capture_end` raises; the stream stays, generators are not told
                raise RuntimeError(
                    "CUDA error: operation failed due to a previous error during capture"
                )
            self.current, graph.ended = before, True
            for generator in told:
                generator.capturing = False
