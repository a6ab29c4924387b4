"""Parts of trials: documents of some of their models, with files and checkpoints."""

import shutil

import pytest
import torch
from support import small

import cgo
from cgo import trial, weights
from cgo.division import restricted, take_part
from cgo.errors import GraphDataError
from cgo.graph import verify
from cgo.planner import Planner
from cgo.runtime import checkpoint
from cgo.user_code import Terminated


def model(id_, module="support.small:mlp", kwargs=None, source="points", seed=0, epochs=3):
    data = cgo.DataSpec(f"support.small:{source}", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=epochs)
    return cgo.Model(module, kwargs, data=data, training=spec, seed=seed, model_id=id_)


class Killed:
    """A trial that is ended in its second epoch, and what an undisturbed one tells."""

    def __init__(self, folder):
        torch.manual_seed(4)
        net = small.mlp(hidden=4)
        given = [
            model("a-stem", "support.small:stemmed"),
            model("b-opaque", "support.small:raises_later", {"after": 10**6}),
            model("c-stem", "support.small:stemmed", seed=1),
            model("d-instance", net),
            model("e-noisy", source="noisy_points", epochs=1),
            model("f-stem", "support.small:stemmed"),  # equals the first
            model("g-lazy", "support.small:lazy"),
        ]
        settings = {"trial_id": "t0", "tuning": {"measure": False}}
        self.folder = folder / "killed"
        self.data = Planner(batch_operators=None).plan(given, self.folder, settings).graph_data
        whole = folder / "whole"
        shutil.copytree(self.folder, whole)
        self.rows = run(cgo.GraphData.read(whole / "graph.json"), whole)
        with pytest.raises(Terminated):
            run(self.data, self.folder, until=1)


def run(data, folder, until=None):
    """Train; gives the rows by model and epoch. Ends in the midst of epoch `until`."""
    rows = {}

    def report(event):
        if event.kind == "epoch":
            if event.epoch == until:
                raise Terminated(143)
            row = {key: value for key, value in event.value.items() if key != "seconds"}
            rows[event.model, event.epoch] = row

    trial.execute(data, folder=folder, report=report)
    return rows


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return Killed(tmp_path_factory.mktemp("division"))


@pytest.mark.parametrize(
    "models",
    [
        ["a-stem"], ["c-stem"], ["b-opaque", "d-instance"], ["a-stem", "c-stem"],
        ["g-lazy"],
        ["a-stem", "b-opaque", "c-stem", "d-instance"],
    ],
    ids="+".join,
)  # fmt: skip
def test_a_part_goes_on_with_the_bits_that_the_whole_would_have_had(models, killed, tmp_path):
    part = take_part(killed.folder, tmp_path / "part", models, "t1")
    assert [entry.id for entry in part.models] == models
    assert part == cgo.GraphData.read(tmp_path / "part" / "graph.json")
    rows = run(part, tmp_path / "part")
    assert rows == {(id_, e): killed.rows[id_, e] for id_ in models for e in (1, 2)}
    for id_ in models:
        other = weights.load(killed.folder.parent / "whole" / "weights" / f"{id_}.safetensors")
        found = weights.load(tmp_path / "part" / "weights" / f"{id_}.safetensors")
        assert all(torch.equal(found[path], value) for path, value in other.items())


def test_nothing_of_the_others_is_left_in_a_part(killed, tmp_path):
    part = take_part(killed.folder, tmp_path / "part", ["c-stem", "e-noisy"], "t7")
    assert set(part.data) == {entry.data for entry in part.models}
    assert len(part.data) == 2
    assert part.aliases == {}
    assert part.experiment["trial_id"] == "t7"
    assert {output.model for output in part.graph.outputs} == {"c-stem", "e-noisy"}
    verify(part.graph)
    part.check_files()
    assert not list((tmp_path / "part").glob("start/*"))
    assert set(checkpoint.load(tmp_path / "part")) == {"c-stem", "e-noisy"}


def test_aliases_follow_their_twins_and_files_their_models(killed, tmp_path):
    part = take_part(killed.folder, tmp_path / "part", ["a-stem", "d-instance"], "t1")
    assert part.aliases == {"f-stem": "a-stem"}
    (start,) = (tmp_path / "part" / "start").iterdir()
    assert start.samefile(killed.folder / "start" / "d-instance.safetensors")  # no copy
    part.check_files()


def test_without_links_files_are_copied(killed, tmp_path, monkeypatch):
    from cgo import division

    def no_links(source, target):
        raise OSError("not supported")

    monkeypatch.setattr(division.os, "link", no_links)
    part = take_part(killed.folder, tmp_path / "part", ["d-instance"], "t1")
    part.check_files()
    assert not (tmp_path / "part" / "start" / "d-instance.safetensors").samefile(
        killed.folder / "start" / "d-instance.safetensors"
    )


def test_a_part_of_no_models_is_a_trial_that_runs(killed, tmp_path):
    part = take_part(killed.folder, tmp_path / "part", [], "t1")
    assert (part.models, part.graph.nodes, part.data) == ((), (), {})
    assert run(part, tmp_path / "part") == {}
    assert not (tmp_path / "part" / "start").exists()


def test_without_a_checkpoint_that_can_be_read_a_part_starts_anew(killed, tmp_path, caplog):
    source = tmp_path / "source"
    shutil.copytree(killed.folder, source)
    (source / checkpoint.NAME).write_bytes(b"damaged")
    part = take_part(source, tmp_path / "part", ["c-stem"], "t1")
    assert "models c-stem start anew" in caplog.text
    rows = run(part, tmp_path / "part")
    assert rows == {("c-stem", e): killed.rows["c-stem", e] for e in range(3)}
    (source / checkpoint.NAME).unlink()
    take_part(source, tmp_path / "other", ["c-stem"], "t2")
    assert checkpoint.load(tmp_path / "other") is None


def test_a_restricted_document_is_the_document_of_its_models(killed):
    everything = [entry.id for entry in killed.data.models]
    assert restricted(killed.data, everything) == killed.data
    with pytest.raises(GraphDataError):
        cgo.GraphData.load(restricted(killed.data, ["a-stem"]).dump() | {"models": []})


def test_models_whose_end_was_told_are_passed_over_by_a_trial_that_goes_on(killed, tmp_path):
    shutil.copytree(killed.folder, tmp_path / "again")
    checkpoint.end(tmp_path / "again", ["b-opaque", "e-noisy"])
    rows = run(cgo.GraphData.read(tmp_path / "again" / "graph.json"), tmp_path / "again")
    assert {id_ for id_, _ in rows} == {"a-stem", "c-stem", "d-instance", "g-lazy"}
    assert rows == {key: row for key, row in killed.rows.items() if key in rows}
    assert checkpoint.load(tmp_path / "again")["e-noisy"]["history"] != []  # it had ended there
