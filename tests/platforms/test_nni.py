"""Trials as trials of a real NNI experiment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.contract import PlatformContract

import cgo
from cgo.platforms.nni import NniPlatform


@pytest.fixture
def platform(tmp_path):
    return NniPlatform(working_directory=tmp_path / "nni")


class TestContract(PlatformContract):
    pass


# --- the whole interface ------------------------------------------------------------------------


class Listener(cgo.AbstractGraphListener):
    """Collects the end of each model; asks for one more at the first."""

    def __init__(self, engine, more):
        self.engine, self.more = engine, more
        self.ended, self.metrics = [], {}

    def on_metric(self, model, metric):
        self.metrics[model.model_id] = metric

    def on_intermediate_metric(self, model, metric):
        assert isinstance(metric, float)

    def on_training_end(self, model, success):
        self.ended.append((model.model_id, success))
        if self.more:
            self.engine.submit_models(self.more.pop())


def candidate(model_id, module="support.small:mlp", **training):
    data = cgo.DataSpec("support.small:points", batch_size=8)
    spec = cgo.TrainingSpec(metrics=("accuracy",), **training)
    return cgo.Model(module, data=data, training=spec, model_id=model_id)


def test_the_interface_in_synchronous_and_asynchronous_use(tmp_path):
    engine = cgo.get_execution_engine(
        experiment_dir=tmp_path / "e",
        platform=NniPlatform(working_directory=tmp_path / "nni"),
        max_models=7,
    )
    try:
        assert cgo.get_execution_engine() is engine
        assert len(engine.query_available_resource()) == 1
        last = candidate("c", epochs=2)
        listener = Listener(engine, [last])
        engine.register_graph_listener(listener)
        # Its factory reads the experiment's settings, which are there in a trial alone.
        first = [candidate("a"), candidate("b", "support.small:configured")]
        engine.submit_models(*first)
        engine.wait_models(*first)
        engine.wait_models()
        assert [(m.model_id, m.status.value) for m in engine.list_models()] == [
            ("a", "trained"), ("b", "trained"), ("c", "trained"),
        ]  # fmt: skip
        assert sorted(listener.ended) == [("a", True), ("b", True), ("c", True)]
        assert listener.metrics == {m.model_id: m.metric for m in engine.list_models()}
        assert last.state_dict()
        assert not engine.budget_exhausted()
    finally:
        engine.close()


@pytest.mark.long
def test_trials_side_by_side_end_in_another_order_than_they_began(tmp_path):
    platform = NniPlatform(concurrency=2, working_directory=tmp_path / "nni")
    with cgo.BaseExecutionEngine(tmp_path / "e", platform=platform) as engine:
        models = [candidate("slow", epochs=400), *(candidate(f"m{n}", epochs=2) for n in range(3))]
        listener = Listener(engine, [])
        engine.register_graph_listener(listener)
        engine.submit_models(*models)
        engine.wait_models()
        ended = [name for name, _ in listener.ended]
    assert ended[-1] != "m2" or ended[0] != "slow"
    for model in models:
        assert len(model.history) == model.training.epochs
        assert listener.metrics[model.model_id] == model.metric == model.history[-1]["val_accuracy"]


def test_a_busy_port_is_named(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        platform = NniPlatform(port=port, working_directory=tmp_path / "nni")
        with cgo.CGOEngine(tmp_path / "e", platform=platform) as engine:
            model = candidate("a")
            engine.submit_models(model)
            engine.wait_models()
    assert f"Port {port} is not idle" in model.error


def test_configurations_of_other_services_are_passed_on_as_they_are():
    from nni.experiment.config import (
        K8sStorageConfig,
        KubeflowConfig,
        KubeflowRoleConfig,
        RemoteConfig,
        RemoteMachineConfig,
    )

    machine = RemoteMachineConfig(host="10.0.0.1", user="me", password="secret")
    remote = RemoteConfig(machine_list=[machine], reuse_mode=False)
    role = KubeflowRoleConfig(
        command="", docker_image="image", replicas=1, gpu_number=1, cpu_number=1, memory_size="1gb"
    )
    storage = K8sStorageConfig(storage_type="nfs", server="10.0.0.2", path="/share")
    kubeflow = KubeflowConfig(
        operator="tf-operator", api_version="v1", storage=storage, worker=role
    )
    for service in (remote, kubeflow):
        platform = NniPlatform(service, concurrency=3, python="python3")
        config = platform._config({})
        assert config.training_service is service
        assert "python3 -P -m cgo.trial" in config.trial_command or sys.version_info < (3, 11)
        assert config.trial_concurrency == 4
        assert platform.idle_workers()[0].device == service.platform


# --- killed processes -----------------------------------------------------------------------------


def wait_for(condition, what, seconds=60):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.1)
    pytest.fail(f"waited {seconds} s for {what}")


def launcher(tmp_path, epochs):
    """A search in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        [sys.executable, "-m", "support.nni_launcher", tmp_path / "experiment", tmp_path / "nni",
         str(epochs)],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def of(tmp_path):
    """Processes that belong to a test: they name its folder, or were started by those that do."""
    found = []
    for process in psutil.process_iter():
        try:
            mine = any(str(tmp_path) in part for part in process.cmdline())
            trial = "cgo.trial" in process.cmdline() and str(tmp_path) in str(process.environ())
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if (mine or trial) and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def trials(tmp_path):
    return [p for p in of(tmp_path) if "cgo.trial" in p.cmdline()]


def managers(tmp_path):
    return [p for p in of(tmp_path) if any(part.endswith("main.js") for part in p.cmdline())]


def port_of(manager):
    command = manager.cmdline()
    return int(command[command.index("--port") + 1])


def is_open(port):
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def begun(tmp_path):
    """Whether an epoch of the second trial has been written down."""
    try:
        models = cgo.open_experiment(tmp_path / "experiment").models()
    except Exception:
        return False
    return sum(bool(model.history) for model in models) > 4


def trained_in(tmp_path):
    """The models of each trial's document, in order."""
    documents = sorted((tmp_path / "experiment" / "trials").glob("*/graph.json"))
    return [[m["id"] for m in json.loads(d.read_text())["models"]] for d in documents]


@pytest.mark.long
@pytest.mark.parametrize("victim", ["trial", "manager", "launcher"])
def test_kill_9_leaves_nothing_behind_and_the_search_goes_on(victim, tmp_path, request):
    """In mid-epoch of the second batch; what the first batch has given stays."""
    search = launcher(tmp_path, epochs=60)
    request.addfinalizer(lambda: [p.kill() for p in of(tmp_path)])
    wait_for(lambda: begun(tmp_path), "the second trial", 120)
    (manager,) = managers(tmp_path)
    port = port_of(manager)
    (trial,) = trials(tmp_path)
    {"trial": trial, "manager": manager, "launcher": search}[victim].send_signal(signal.SIGKILL)
    if victim == "launcher":
        search.wait()
        wait_for(lambda: not of(tmp_path), "all processes to end", 15)
        assert not is_open(port)
        search = launcher(tmp_path, epochs=60)
    output = search.communicate(timeout=240)[0]
    ended = eval(output.strip().splitlines()[-1])
    assert len(ended) == 8
    assert all(status == "trained" for status, _ in ended.values())
    wait_for(lambda: not of(tmp_path), "all processes to end", 15)
    assert not is_open(port)
    first, *rest = trained_in(tmp_path)
    assert not any(set(first) & set(later) for later in rest)


# --- neighbours on the network ------------------------------------------------------------------


def status(port, **headers):
    """What the manager's REST server says; None where it hangs up."""
    import requests

    try:
        url = f"http://127.0.0.1:{port}/api/v1/nni/check-status"
        return requests.get(url, headers=headers, timeout=20).status_code
    except requests.ConnectionError:
        return None


def tuner_answers(port):
    """Whether a further connection to the tuner's channel is taken."""
    import asyncio

    import websockets

    async def connect():
        async with websockets.connect(f"ws://127.0.0.1:{port}/tuner"):
            return True

    try:
        return asyncio.run(connect())
    except (OSError, EOFError, websockets.exceptions.WebSocketException):
        return False


def addresses(pid, port):
    """Where a process listens on a port."""
    connections = psutil.Process(pid).net_connections(kind="tcp")
    return {c.laddr.ip for c in connections if c.laddr.port == port and c.status == "LISTEN"}


@pytest.mark.parametrize("private", [True, False])
def test_neighbours_find_no_manager_and_no_second_tuner(private, tmp_path, monkeypatch):
    monkeypatch.delenv("NODE_OPTIONS", raising=False)
    platform = NniPlatform(working_directory=tmp_path / "nni", private=private)
    with cgo.CGOEngine(tmp_path / "e", platform=platform) as engine:
        first = candidate("first")
        engine.submit_models(first)
        engine.wait_models(timeout_s=200)
        manager = platform._manager
        port = manager.port
        assert (addresses(manager.pid, port) == {"127.0.0.1"}) is private
        assert status(port) == 200
        assert (status(port, Origin="http://evil.example") is None) is private
        assert (status(port, Host="evil.example") is None) is private
        assert status(port, Origin=f"http://localhost:{port}") == 200
        assert not tuner_answers(port)
        second = candidate("second", epochs=2)  # the first tuner is heard all the same
        engine.submit_models(second)
        engine.wait_models(timeout_s=200)
    assert [m.status.value for m in (first, second)] == ["trained", "trained"], second.error
    assert "NODE_OPTIONS" not in os.environ


def test_the_setting_of_allowed_modules_is_the_managers(tmp_path):
    platform = NniPlatform(working_directory=tmp_path / "nni")
    with cgo.CGOEngine(tmp_path / "e", platform=platform, allowed_modules=("support",)) as engine:
        good = candidate("good")
        engine.submit_models(good)
        engine.wait_models(timeout_s=200)
        assert good.status.value == "trained", good.error
        assert "CGO_ALLOWED_MODULES=support" in platform._manager._experiment.config.trial_command


def test_a_process_that_is_no_trial_is_not_killed(tmp_path):
    from cgo.platforms.nni import _kill_trial

    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as bystander, subprocess.Popen([*command, "cgo.trial"]) as trial:
        try:
            _kill_trial(bystander.pid)
            _kill_trial(trial.pid)
            _kill_trial(2**22 + 1)  # nobody's
            assert trial.wait(timeout=20) == -signal.SIGKILL
            assert bystander.poll() is None
        finally:
            bystander.kill()
