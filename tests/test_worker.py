"""Processes that take one trial after another: each trial is as in a process of its own."""

import os
import signal
import threading
import time

import psutil
import pytest
import torch
from support.contract import Heard

import cgo
from cgo import weights
from cgo.planner import Planner
from cgo.platforms.base import TrialRequest
from cgo.platforms.local import LocalPlatform

V = "support.visits:visitor"
TESTS = os.path.dirname(__file__)
SETTINGS = {"tuning": {"measure": False}}


@pytest.fixture
def platform():
    platform = LocalPlatform()
    yield platform
    platform.close()


class Trials:
    """Runs trials of a platform, one after another."""

    def __init__(self, platform, folder):
        self.platform, self.folder, self.count = platform, folder, 0
        self.heard = Heard(platform)

    def submit(self, *models, roots=(TESTS,), modules=()):
        self.count += 1
        folder = self.folder / f"t{self.count}"
        assert not Planner().plan(models, folder, SETTINGS).failures
        request = TrialRequest(folder.name, folder, roots, modules=frozenset(modules))
        self.platform.submit(request)
        return folder

    def run(self, *models, **where):
        folder = self.submit(*models, **where)
        return folder, self.heard.exit()

    def pids(self):
        """The process of each trial, and that each began with its own copy of the module."""
        rows = [row.split() for row in (self.folder / "pids").read_text().splitlines()]
        assert {visits for _, visits in rows} == {"1"}
        return [int(pid) for pid, _ in rows]

    def result(self, folder):
        """What a trial gave, bit for bit."""
        rows = [
            (event.model, event.kind, event.epoch, without_time(event.value))
            for event in self.heard.of(folder.name)
            if event.kind in ("epoch", "final")
        ]
        files = sorted((folder / "weights").iterdir())
        return rows, {file.name: weights.load(file) for file in files}


def without_time(value):
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value


def same(left, right):
    assert left[0] == right[0]
    assert left[0]
    assert left[1].keys() == right[1].keys()
    for name, state in left[1].items():
        assert all(torch.equal(value, right[1][name][key]) for key, value in state.items())


@pytest.fixture
def trials(platform, tmp_path):
    return Trials(platform, tmp_path)


def model(trials, does=None, id_="m", module=V, **training):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), epochs=2, **training)
    kwargs = {"path": str(trials.folder / "pids"), "does": does}
    return cgo.Model(module, kwargs, data=data, training=spec, model_id=id_)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """What a model gives in a process of its own."""
    platform = LocalPlatform(warm=False)
    trials = Trials(platform, tmp_path_factory.mktemp("fresh"))
    folder, ended = trials.run(model(trials))
    assert ended.error is None
    platform.close()
    return trials.result(folder)


def test_trials_in_one_process_give_what_they_give_in_their_own(trials, fresh):
    """After one that sets whatever can be set back; and each log has its own lines only."""
    logs = []
    does_all = ("prints", "sets_everything", "sets_global_seeds", "freezes_what_it_leaves")
    for does in (None, *does_all, None):
        folder, ended = trials.run(model(trials, does))
        assert ended.error is None
        logs.append((folder / "log.txt").read_text())
    assert len(set(trials.pids())) == 1
    same(trials.result(folder), fresh)
    assert "python says ['prints']\na shell says\n" in logs[1]
    assert not any("says" in log for log in (logs[0], *logs[2:]))


@pytest.mark.long
@pytest.mark.parametrize(
    "does",
    [
        "patches_a_function", "patches_a_class", "patches_defaults", "hooks_all_modules",
        "changes_precision", "leaves_a_thread", "leaves_a_process", "leaves_at_exit",
    ],
)  # fmt: skip
def test_what_cannot_be_undone_for_certain_ends_the_process(does, trials, fresh):
    _, ended = trials.run(model(trials, does))
    assert ended.error is None
    folder, ended = trials.run(model(trials))
    assert ended.error is None
    same(trials.result(folder), fresh)
    first, second = trials.pids()
    assert first != second
    assert not psutil.pid_exists(first)


def test_a_mode_that_was_entered_is_left(trials, fresh):
    trials.run(model(trials, "enters_a_mode"))
    folder, _ = trials.run(model(trials))
    same(trials.result(folder), fresh)


@pytest.mark.parametrize(
    ("does", "how"),
    [("exits", "exit code 3"), ("kills", "SIGKILL"), ("segfaults", "SIGSEGV")],
)
def test_a_crash_is_told_and_the_next_trial_runs_elsewhere(does, how, trials, fresh):
    trials.run(model(trials))
    _, ended = trials.run(model(trials, does))
    assert how in ended.error
    folder, ended = trials.run(model(trials))
    assert ended.error is None
    same(trials.result(folder), fresh)
    first, crashed, last = trials.pids()
    assert first == crashed != last


def test_a_process_that_has_grown_is_replaced(tmp_path):
    platform = LocalPlatform(max_growth_bytes=250_000_000)
    trials = Trials(platform, tmp_path)
    for does in (None, "leaks_memory", None):
        _, ended = trials.run(model(trials, does))
        assert ended.error is None
    first, second, third = trials.pids()
    assert first == second != third
    platform.close()


@pytest.fixture
def with_library(tmp_path, monkeypatch):
    """Trials on a machine with an installed library that patches torch when it is imported."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "patching_library.py").write_text("import torch\ntorch.relu = torch.tanh\n")
    (folder / "harmless_library.py").write_text("")
    (folder / "fatal_library.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    platform = LocalPlatform()
    yield Trials(platform, tmp_path)
    platform.close()


def test_what_a_trial_had_to_import_is_imported_before_the_next(with_library, fresh):
    """And who names other modules never meets it."""
    trials = with_library
    for does, modules in [("imports_a_library", {"a"})] * 3 + [(None, {"b"})]:
        folder, ended = trials.run(model(trials, does), modules=modules)
        assert ended.error is None
    first, second, third, fourth = trials.pids()
    assert first != second == third != fourth
    same(trials.result(folder), fresh)


def test_what_trials_will_import_is_imported_while_they_are_planned(with_library, fresh):
    trials = with_library
    trials.run(model(trials), modules={"c"})
    for modules, library in (({"a"}, "patching_library"), ({"c"}, "harmless_library")):
        trials.platform.expect(frozenset(modules), (library, "no_library"))
        folder, ended = trials.run(model(trials), modules=modules)
        assert ended.error is None
        trials.run(model(trials), modules=modules)
    _, ended = trials.run(model(trials), modules={"d"})
    assert ended.error is None
    pids = trials.pids()
    assert pids[0] == pids[1] == pids[2]  # one process brought it
    assert pids[2] != pids[3]  # and is for nobody else
    assert len(set(pids[3:])) == 1  # what leaves nothing behind is no reason for another
    same(trials.result(folder), fresh)


def test_a_library_that_ends_its_process_is_not_imported_beforehand_again(with_library, fresh):
    trials = with_library
    trials.platform.expect(frozenset({"a"}), ("fatal_library",))
    for _ in range(2):
        folder, ended = trials.run(model(trials), modules={"a"})
        assert ended.error is None
    same(trials.result(folder), fresh)
    assert len(set(trials.pids())) == 1


def test_a_module_that_was_edited_is_read_again(trials, tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    data = cgo.DataSpec("support.small:points", batch_size=8)

    def widths(width):
        source = f"from torch import nn\ndef net(): return nn.Sequential(nn.Linear(6, {width})"
        (root / "edited_nets.py").write_text(f"{source}, nn.Linear({width}, 3))\n")
        one = cgo.Model("edited_nets:net", data=data, training=cgo.TrainingSpec(), model_id="m")
        folder, ended = trials.run(one, roots=(TESTS, str(root)))
        assert ended.error is None
        return weights.load(folder / "weights" / "m.safetensors")["0.weight"].shape

    def forget():
        import sys

        sys.modules.pop("edited_nets", None)

    import sys

    sys.path.insert(0, str(root))
    try:
        for width in (4, 57, 9):
            forget()
            assert widths(width) == (width, 6)
    finally:
        sys.path.remove(str(root))
        forget()


def test_documents_in_any_order_give_the_same_bits(platform, trials, tmp_path):
    """Merged models with dropout and norms, and one that no capture takes."""
    data = cgo.DataSpec("support.small:noisy_points", batch_size=8)

    def spec(**more):
        return cgo.TrainingSpec(metrics=("accuracy",), epochs=2, **more)

    def merged():
        return [
            cgo.Model("support.small:mlp", {"hidden": width, "dropout": 0.2}, data=data,
                      training=spec(optimizer="Adam"), model_id=f"m{width}", seed=width)
            for width in (4, 6)
        ]  # fmt: skip

    def opaque():
        return [cgo.Model("support.small:counting", data=data, training=spec(), model_id="opaque")]

    runs = {"merged": [], "opaque": []}
    for name in ("merged", "opaque", "opaque", "merged", "merged"):
        made = {"merged": merged, "opaque": opaque}[name]()
        folder, ended = trials.run(*made)
        assert ended.error is None
        runs[name].append(trials.result(folder))
    cold = LocalPlatform(warm=False)
    alone = Trials(cold, tmp_path / "cold")
    for name, made in (("merged", merged()), ("opaque", opaque())):
        folder, _ = alone.run(*made)
        for result in runs[name]:
            same(result, alone.result(folder))
    cold.close()


def test_a_trial_that_is_cancelled_takes_its_process_along(trials):
    slow = cgo.Model(
        "support.small:mlp",
        data=cgo.DataSpec("support.small:slow_points", batch_size=8),
        training=cgo.TrainingSpec(epochs=1000),
        model_id="slow",
    )
    folder = trials.submit(slow)
    while not trials.heard.of(folder.name):
        time.sleep(0.01)
    worker = trials.platform._slots[0].worker
    trials.platform.cancel(folder.name)
    assert trials.heard.exit().cancelled
    assert not psutil.pid_exists(worker.process.pid)
    _, ended = trials.run(model(trials))
    assert ended.error is None


def test_a_trial_that_is_cancelled_while_its_process_warms_up(trials):
    folder = trials.submit(model(trials))
    trials.platform.cancel(folder.name)
    assert trials.heard.exit().cancelled
    assert not trials.heard.of(folder.name)
    _, ended = trials.run(model(trials))
    assert ended.error is None


def test_another_takes_the_place_of_an_idle_process_that_was_killed(trials):
    trials.run(model(trials))
    (pid,) = trials.pids()
    os.kill(pid, signal.SIGKILL)
    _, ended = trials.run(model(trials))
    assert ended.error is None
    assert trials.pids()[1] != pid


def test_another_environment_needs_another_process(trials, monkeypatch):
    trials.run(model(trials))
    monkeypatch.setenv("MKL_NUM_THREADS", "1")
    trials.run(model(trials))
    first, second = trials.pids()
    assert first != second


def test_idle_processes_end_with_their_platform(tmp_path):
    platform = LocalPlatform(workers=2)
    trials = Trials(platform, tmp_path)
    trials.run(model(trials))
    workers = [slot.worker for slot in platform._slots]
    started = time.monotonic()
    platform.close()
    assert time.monotonic() - started < 2
    assert not any(psutil.pid_exists(worker.process.pid) for worker in workers)
    assert not any(thread.name.startswith("cgo-worker") for thread in threading.enumerate())


def test_a_warm_process_begins_at_once(trials):
    trials.run(model(trials))
    heard = trials.heard.events
    folder = trials.folder / "timed"
    assert not Planner().plan([model(trials)], folder, SETTINGS).failures
    count, started = len(heard), time.monotonic()
    trials.platform.submit(TrialRequest("timed", folder, (TESTS,)))
    while len(heard) == count:
        time.sleep(0.001)
    seconds = time.monotonic() - started
    assert heard[count][1].value == {"what": "begun"}
    assert trials.heard.exit().error is None
    assert seconds < 2.0  # a few hundredths of a second on an idle machine
