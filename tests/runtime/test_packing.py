"""Packed state: one leaf for several models, and each model's own tensors as views of it."""

import copy

import pytest
import torch
from support import nets
from support.merged import Case, Merged, assert_equal_float64

import cgo
from cgo import trial, weights
from cgo.graph import Graph, Node, Output, Ref, TensorType
from cgo.planner import Planner
from cgo.runtime.gradients import learning_places
from cgo.runtime.member import Member
from cgo.runtime.packing import Pack, PackedState, plan_packs, rehome, release

CPU = torch.device("cpu")


def cases(count=3, **training):
    given = {"optimizer_kwargs": {"lr": 0.05, "momentum": 0.9}, "epochs": 2, **training}
    return [Case(f"m{seed}", "mlp", {"width": 8}, seed=seed, training=given)
            for seed in range(count)]  # fmt: skip


def planned(given, folder):
    """A planned trial and its members, before anything is packed."""
    data = Planner().plan([case.model() for case in given], folder).graph_data
    members = [Member(entry, data, CPU, folder, lambda event: None) for entry in data.models]
    return data, {member.id: member for member in members}


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


# --- which tensors are packed -------------------------------------------------------------------


def test_every_parameter_and_statistic_of_equal_models_is_packed(tmp_path):
    data, members = planned(cases(), tmp_path)
    packs = plan_packs(data.graph)
    assert all([model for model, _ in pack.places] == ["m0", "m1", "m2"] for pack in packs)
    assert all(len({path for _, path in pack.places}) == 1 for pack in packs)
    packed = {pack.places[0][1]: pack.trainable for pack in packs}
    state = members["m0"].state
    assert {path for path, trained in packed.items() if trained} == {
        entry.path for entry in state.entry.state if entry.kind == "parameter"
    }


def graph_of(*members, program="train/4", group="g"):
    """A group that multiplies its own parameter with its own buffer, and its loss."""
    nodes, outputs = [], []
    type_ = (TensorType("float64", (3,)),)
    for model, op, trainable in members:
        given = {"model": model, "path": "p"}
        given |= {"trainable": trainable} if op == "cgo.parameter" else {}
        kwargs = tuple(sorted(given.items()))
        owners = frozenset({model})
        nodes.append(Node(f"{model}.p", op, (), kwargs, type_, owners))
        nodes.append(
            Node(f"{model}/{program}/op", "aten.mul.Tensor", (Ref(f"{model}.p"), 2.0), (), type_,
                 owners, group=group)
        )  # fmt: skip
        outputs.append(Output(model, program, "loss", "", Ref(nodes[-1].name)))
    nodes.sort(key=lambda node: node.group is not None)
    return Graph(tuple(nodes), tuple(outputs))


def test_what_is_trained_is_not_packed_with_what_is_not():
    trained, frozen = ("a", "cgo.parameter", True), ("b", "cgo.parameter", False)
    assert plan_packs(graph_of(trained, frozen)) == ()
    (pack,) = plan_packs(graph_of(trained, ("b", "cgo.parameter", True)))
    assert pack == Pack(("a.p", "b.p"), (("a", "p"), ("b", "p")), True)
    (pack,) = plan_packs(graph_of(("a", "cgo.buffer", None), ("b", "cgo.buffer", None)))
    assert not pack.trainable


def test_only_what_a_loss_depends_on_learns():
    graph = graph_of(("a", "cgo.parameter", True), ("b", "cgo.parameter", True))
    assert learning_places(graph) == {("a", "p"), ("b", "p")}
    cut = [
        Node(n.name, "aten.detach.default", n.args[:1], (), n.types, n.owners)
        if n.name == "b/train/4/op" else n
        for n in graph.nodes
    ]  # fmt: skip
    assert learning_places(Graph(tuple(cut), graph.outputs)) == {("a", "p")}


def test_training_groups_choose_their_company_first(tmp_path):
    """Evaluation may group other models together; a parameter is in one pack only."""
    both = [("a", "cgo.parameter", True), ("b", "cgo.parameter", True)]
    training = graph_of(*both)
    evaluation = graph_of(*both[::-1], program="validation/4", group="h")
    sources = [node for node in training.nodes if node.group is None]
    operators = [n for g in (evaluation, training) for n in g.nodes if n.group is not None]
    merged = Graph((*sources, *operators), (*evaluation.outputs, *training.outputs))
    (pack,) = plan_packs(merged)
    assert pack.names == ("a.p", "b.p")


# --- views --------------------------------------------------------------------------------------


def test_own_tensors_keep_identity_and_value_and_become_views(tmp_path):
    data, members = planned(cases(), tmp_path)
    before = {id_: dict(member.state.tensors) for id_, member in members.items()}
    values = copy.deepcopy(before)
    packed = PackedState(plan_packs(data.graph), members)
    for id_, member in members.items():
        for path, tensor in member.state.tensors.items():
            assert tensor is before[id_][path]
            assert torch.equal(tensor, values[id_][path])
            assert storage(tensor) == storage(packed.place[id_, path])
            assert isinstance(tensor, torch.nn.Parameter) == tensor.requires_grad
    with torch.no_grad():
        for leaf in packed.leaves.values():
            leaf.add_(1)
    weight = members["m1"].state.tensors
    assert all(torch.equal(weight[path], values["m1"][path] + 1) for path in weight)


def test_gradients_are_views_of_the_leafs_and_none_before_a_backward(tmp_path):
    data, members = planned(cases(), tmp_path)
    packed = PackedState(plan_packs(data.graph), members)
    packed.hand_out_gradients()
    own = members["m2"].state.parameters()
    assert all(parameter.grad is None for parameter in own)
    packed.zero_grad()
    sum((leaf * 3).sum() for leaf, _ in packed.learning).backward()
    packed.hand_out_gradients()
    leaves = {storage(leaf.grad) for leaf, _ in packed.learning}
    for parameter in own:
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3))
        assert storage(parameter.grad) in leaves


def test_any_optimizer_steps_through_the_views(tmp_path):
    """Also one that forgets gradients: the next step hands out new ones."""
    data, members = planned(cases(), tmp_path)
    packed = PackedState(plan_packs(data.graph), members)
    own = members["m1"].state.parameters()
    others = [leaf[0].clone() for leaf in packed.leaves.values()]
    expected = [parameter.detach().clone() for parameter in own]
    optimizer = torch.optim.SGD(own, lr=0.1)
    for _ in range(2):
        packed.zero_grad()
        sum(leaf.sum() for leaf, _ in packed.learning).backward()
        packed.hand_out_gradients()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for parameter, start in zip(own, expected):
        torch.testing.assert_close(parameter.detach(), start - 0.2)
        assert storage(parameter) in {storage(leaf) for leaf in packed.leaves.values()}
    assert all(torch.equal(a, leaf[0]) for a, leaf in zip(others, packed.leaves.values()))


def test_a_model_that_left_gets_memory_of_its_own(tmp_path):
    own = [torch.nn.Parameter(torch.full((3,), float(i))) for i in range(3)]
    leaf = torch.stack([tensor.detach() for tensor in own])
    rehome(own, leaf)
    _, members = planned(cases(1), tmp_path)
    member = members["m0"]
    member.state.tensors = {"p": own[0], "q": own[1]}
    release(member, {id(own[1])})
    assert storage(own[0]) != storage(leaf) == storage(own[1])
    assert own[0].untyped_storage().nbytes() == 3 * 4
    assert own[0].tolist() == [0, 0, 0]


# --- what leaves and enters a lane ----------------------------------------------------------------


def test_weights_load_into_the_users_module_and_are_no_larger_than_its_own(tmp_path):
    given = cases(6)
    merged = Merged(given, tmp_path)
    for case in given:
        net = nets.mlp(**case.kwargs)
        net.load_state_dict(merged.state(case.id), strict=True)
        weights.save(tmp_path / "own.safetensors", net.state_dict())
        lane = tmp_path / merged.ended(case.id)["weights"]
        assert lane.stat().st_size <= (tmp_path / "own.safetensors").stat().st_size


def test_a_checkpoint_of_many_is_as_large_as_checkpoints_of_each(tmp_path):
    """A view saved as it is would take the whole pack along."""
    given = [Case(f"m{seed}", "mlp", {"width": 64}, seed=seed,
                  training={"optimizer": "Adam", "epochs": 2}) for seed in range(6)]  # fmt: skip
    sizes = {}
    for name, some in (("one", given[:1]), ("six", given)):
        plan = Planner().plan([case.model() for case in some], tmp_path / name)

        def first_epoch(event, name=name):
            checkpoint = tmp_path / name / "checkpoint.pt"
            if event.kind == "epoch" and event.epoch == 1 and checkpoint.exists():
                sizes[name] = checkpoint.stat().st_size

        trial.execute(plan.graph_data, folder=tmp_path / name, report=first_epoch)
    assert sizes["six"] <= 6.1 * sizes["one"]


def test_a_users_trained_module_goes_on_in_a_lane(tmp_path, monkeypatch):
    """The other way round: modules trained elsewhere are submitted, and packed."""
    training = {"optimizer_kwargs": {"lr": 0.05}, "epochs": 1, "precision": "float64"}
    given = [Case(f"m{seed}", "trained", training=training, seed=seed) for seed in range(3)]
    nets_of = {case.id: trained_elsewhere(case.seed) for case in given}
    like = cases(**training)[0].model()
    models = [
        cgo.Model(net, data=like.data, training=like.training, seed=index, model_id=id_)
        for index, (id_, net) in enumerate(nets_of.items())
    ]
    plan = Planner().plan(models, tmp_path)
    assert plan_packs(plan.graph_data.graph)
    trial.execute(plan.graph_data, folder=tmp_path)
    for case in given:
        start = copy.deepcopy(nets_of[case.id])
        monkeypatch.setattr(nets, "trained", lambda start=start: start, raising=False)
        found = weights.load(tmp_path / "weights" / f"{case.id}.safetensors")
        for name, value in case.alone().state.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11)


def trained_elsewhere(seed):
    torch.manual_seed(seed)
    net = nets.mlp(width=8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(torch.randn(16, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    return net


@pytest.mark.parametrize("optimizer", ["Adadelta", "NAdam"])
def test_optimizers_without_a_rule_step_on_packed_state(optimizer, tmp_path):
    given = cases(optimizer=optimizer, optimizer_kwargs={"lr": 0.01}, precision="float64")
    merged = Merged(given, tmp_path)
    for case in given:
        assert_equal_float64(merged, case)
