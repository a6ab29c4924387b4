"""A part of a trial that crashed, as a trial of its own: its models go on from the checkpoint."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from cgo.graph import ModelId, restrict
from cgo.graph_data import FileRef, GraphData
from cgo.runtime import checkpoint


def restricted(data: GraphData, models: Collection[ModelId]) -> GraphData:
    """The document of some of its models: nothing of the others is left in it.

    Args:
        data: The whole document.
        models: Some of its models; aliases follow the models that they are equal to.
    """
    entries = tuple(entry for entry in data.models if entry.id in models)
    graph = restrict(data.graph, models=set(models))
    needed = any(node.op == "cgo.constant" for node in graph.nodes)
    return replace(
        data,
        models=entries,
        data={entry.data: data.data[entry.data] for entry in entries},
        graph=graph,
        constants=data.constants if needed else None,
        aliases={alias: twin for alias, twin in data.aliases.items() if twin in models},
    )


def take_part(source: Path, target: Path, models: Collection[ModelId], trial_id: str) -> GraphData:
    """Write what a trial needs to go on with some of another's models.

    Args:
        source: The other trial's folder: its document, the files that this refers to, and its
            checkpoint, if it has one. It stays as it is.
        target: The new trial's folder.
        models: What that is to train.
        trial_id: Its id, which its settings name.

    Returns:
        The new trial's document.

    Raises:
        GraphDataError: the other's document cannot be read.
        OSError: a file cannot be written.
    """
    whole = GraphData.read(source / "graph.json")
    part = restricted(whole, models)
    part = replace(part, experiment={**whole.experiment, "trial_id": trial_id}, base=target)
    target.mkdir(parents=True, exist_ok=True)
    for reference in part.files().values():
        share_file(source, target, reference)
    checkpoint.take(source, target, models)
    part.write(target / "graph.json")
    return part


def share_file(source: Path, target: Path, reference: FileRef) -> None:
    """Put a file of one folder into another, too; neither trial ever writes into it.

    Raises:
        OSError: it cannot be read, or written there.
    """
    path = target / reference.file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an attempt that a crash has cut short
    try:
        os.link(source / reference.file, path)
    except OSError:  # a file system without links
        shutil.copyfile(source / reference.file, path)
