"""What every platform must do: subclass, give a `platform` fixture, and the tests run."""

import queue
import time

import pytest

import cgo
from cgo.commands import Command
from cgo.errors import TrialError
from cgo.imports import import_roots
from cgo.planner import Planner
from cgo.platforms.base import Commanded, TrialRequest

WAIT_S = 60


class Heard:
    """Collects what a platform reports."""

    def __init__(self, platform):
        self.events, self.exits = [], queue.Queue()
        platform.start(lambda trial, event: self.events.append((trial, event)), self.exits.put)

    def exit(self):
        return self.exits.get(timeout=WAIT_S)

    def of(self, trial):
        return [event for name, event in self.events if name == trial]

    def until(self, trial, kind):
        """Wait for an event of a kind."""
        deadline = time.monotonic() + WAIT_S
        while not any(event.kind == kind for event in self.of(trial)):
            assert time.monotonic() < deadline, f"no {kind}"
            time.sleep(0.01)


class PlatformContract:
    @pytest.fixture
    def heard(self, platform):
        yield Heard(platform)
        platform.close()

    def request(self, tmp_path, trial_id="t0", module="support.small:mlp", how=None, **training):
        data = cgo.DataSpec("support.small:slow_points", batch_size=8)
        spec = cgo.TrainingSpec(metrics=("accuracy",), **training)
        kwargs = {} if how is None else {"how": how}
        model = cgo.Model(module, kwargs, data=data, training=spec, model_id=f"{trial_id}-m")
        folder = tmp_path / trial_id
        assert not Planner().plan([model], folder).failures
        return TrialRequest(trial_id, folder, import_roots([module]))

    def test_a_trial_reports_its_events_and_then_its_exit(self, platform, heard, tmp_path):
        platform.submit(self.request(tmp_path, epochs=2))
        ended = heard.exit()
        assert (ended.trial_id, ended.error, ended.cancelled) == ("t0", None, False)
        kinds = [event.kind for event in heard.of("t0") if event.model]
        assert kinds == ["started", "epoch", "epoch", "final", "ended"]
        assert (tmp_path / "t0" / "weights" / "t0-m.safetensors").is_file()

    def test_a_busy_worker_takes_no_second_trial(self, platform, heard, tmp_path):
        assert platform.has_idle_worker()
        assert len(platform.idle_workers()) == 1
        platform.submit(self.request(tmp_path, epochs=50))
        assert not platform.has_idle_worker()
        assert platform.idle_workers() == []
        with pytest.raises(TrialError, match="no idle worker"):
            platform.submit(self.request(tmp_path, "t1"))
        platform.cancel("t0")
        heard.exit()
        assert platform.has_idle_worker()

    def test_a_cancelled_trial_exits_as_such_and_may_be_cancelled_again(
        self, platform, heard, tmp_path
    ):
        platform.submit(self.request(tmp_path, epochs=1000))
        while not heard.of("t0"):
            pass
        platform.cancel("t0")
        platform.cancel("t0")
        platform.cancel("unknown")
        assert heard.exit().cancelled
        assert not any(event.kind == "ended" for event in heard.of("t0"))

    def test_a_crash_is_an_exit_with_an_error(self, platform, heard, tmp_path):
        platform.submit(self.request(tmp_path, module="support.small:crashes"))
        ended = heard.exit()
        assert "SIGKILL" in ended.error
        assert not ended.cancelled

    def test_leaving_with_exit_code_0_is_no_end_of_a_trial(self, platform, heard, tmp_path):
        platform.submit(self.request(tmp_path, module="support.crashers:crasher", how="exit 0"))
        ended = heard.exit()
        assert "exit code 0, before its models had ended" in ended.error
        assert "its log is" in ended.error
        assert not ended.cancelled

    def test_a_trial_that_cannot_start_tells_why(self, platform, heard, tmp_path):
        request = self.request(tmp_path)
        (request.folder / "graph.json").write_text("{}")
        platform.submit(request)
        assert "document version None" in heard.exit().error

    def test_closing_cancels_and_waits(self, platform, heard, tmp_path):
        platform.submit(self.request(tmp_path, epochs=1000))
        platform.close()
        assert heard.exits.get_nowait().cancelled

    # --- with a channel into trials -------------------------------------------------------------

    @pytest.fixture
    def commanded(self, platform):
        if not isinstance(platform, Commanded):
            pytest.skip("this platform has no channel into its trials")
        return platform

    def test_models_are_added_to_a_trial_that_runs(self, commanded, heard, tmp_path):
        commanded.submit(self.request(tmp_path, epochs=30))
        more = self.request(tmp_path, "t1", epochs=2)
        heard.until("t0", "epoch")
        command = Command("add", str(more.folder / "graph.json"), ("t1-m",))
        assert commanded.command("t0", command)
        assert heard.exit().error is None
        told = [e.value for e in heard.of("t0") if e.kind == "trial"]
        assert [value["models"] for value in told if value["what"] == "added"] == [["t1-m"]]
        ended = {e.model: e.value["success"] for e in heard.of("t0") if e.kind == "ended"}
        assert set(ended) == {"t0-m", "t1-m"}

    def test_models_of_a_trial_that_runs_are_stopped(self, commanded, heard, tmp_path):
        commanded.submit(self.request(tmp_path, epochs=10_000))
        heard.until("t0", "epoch")
        assert commanded.command("t0", Command("stop", models=("t0-m",)))
        ended = heard.exit()
        assert (ended.error, ended.cancelled) == (None, False)
        (value,) = [e.value for e in heard.of("t0") if e.kind == "ended"]
        assert value["cancelled"]

    def test_a_command_may_come_before_the_trial_is_up(self, commanded, heard, tmp_path):
        commanded.submit(self.request(tmp_path, epochs=10_000))
        assert commanded.command("t0", Command("stop", models=("t0-m",)))
        assert heard.exit().error is None
        assert not any(event.kind == "epoch" for event in heard.of("t0"))

    def test_nobody_hears_what_is_told_to_a_trial_that_is_gone(self, commanded, heard, tmp_path):
        command = Command("stop", models=("t0-m",))
        assert not commanded.command("unknown", command)
        assert commanded.worker_of("unknown") is None
        commanded.submit(self.request(tmp_path, epochs=10_000))
        worker = commanded.worker_of("t0")
        assert 0 < worker.free_memory_bytes <= worker.total_memory_bytes
        commanded.cancel("t0")
        assert not commanded.command("t0", command)
        heard.exit()
        assert not commanded.command("t0", command)
        assert commanded.worker_of("t0") is None
