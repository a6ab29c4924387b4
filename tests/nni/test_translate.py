"""Evaluators and spaces of NNI as our specs, and what is not translated."""

import nni
import pytest
import torch
from nni.nas.evaluator.pytorch import Classification, DataLoader, Regression
from nni.nas.space import RawFormatModelSpace, SimplifiedModelSpace
from support import nni_spaces
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from cgo.imports import resolve
from cgo.nni.spaces import build
from cgo.nni.translate import NotTranslated, Translator


@pytest.fixture
def translator(tmp_path):
    return Translator(tmp_path / "data")


def frozen(evaluator, kind=SimplifiedModelSpace):
    space = kind.from_model(nni_spaces.DigitsSpace(), evaluator)
    return space.freeze({"act": "tanh", "width": 12})


def translated(translator, evaluator, kind=SimplifiedModelSpace):
    return translator.model(frozen(evaluator, kind), lambda text: f"m-{text}")


def test_a_classification(translator):
    model = translated(
        translator,
        nni_spaces.evaluator(
            0.5, 3, weight_decay=0.25, optimizer=torch.optim.SGD, gradient_clip_val=2.0
        ),
    )
    training = model.training
    assert (training.loss, training.metrics, training.epochs) == ("cross_entropy", ("accuracy",), 3)
    assert (training.optimizer, training.grad_clip_norm) == ("SGD", 2.0)
    assert training.optimizer_kwargs == {"lr": 0.5, "weight_decay": 0.25}
    assert (model.data.batch_size, model.data.shuffle) == (32, True)
    train, validation = resolve(model.data.source)(**model.data.kwargs)
    expected = nni_spaces.digits()
    for found, given in zip((train, validation), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found.tensors, given.tensors, strict=True))


def test_a_regression(translator):
    data = TensorDataset(torch.randn(8, 64), torch.randn(8, 10))
    loader = DataLoader(Subset(data, [0, 2, 4]), batch_size=2, drop_last=True)
    model = translated(
        translator,
        Regression(criterion=nn.L1Loss, train_dataloaders=loader, val_dataloaders=loader,
                   max_epochs=1, logger=False),
    )  # fmt: skip
    assert (model.training.loss, model.training.metrics) == ("l1_loss", ("mean_squared_error",))
    assert (model.training.optimizer, model.training.optimizer_kwargs["lr"]) == ("Adam", 0.001)
    assert (model.data.shuffle, model.data.drop_last) == (False, True)
    train, _ = resolve(model.data.source)(**model.data.kwargs)
    assert torch.equal(train.tensors[0], data.tensors[0][[0, 2, 4]])


def test_the_network_is_the_spaces(translator):
    model = translated(translator, nni_spaces.evaluator())
    torch.manual_seed(1)
    first = build(**model.kwargs)
    torch.manual_seed(1)
    second = build(**model.kwargs)
    assert first.first.out_features == 12
    assert isinstance(first.act, nn.Tanh)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_a_raw_space_is_sent_with_its_weights(translator):
    model = translated(translator, nni_spaces.evaluator(), RawFormatModelSpace)
    assert isinstance(model.module, nn.Module)
    assert model.module.first.out_features == 12


def test_equal_candidates_are_equal_and_others_are_not(translator):
    space = nni_spaces.space()

    def of(**changed):
        sample = {"act": "relu", "width": 8, "lr": 0.01} | changed
        return translator.model(space.freeze(sample), lambda text: text)

    assert of().model_id == of().model_id
    assert of().seed == of().seed
    assert of().model_id != of(lr=0.03).model_id != of(width=12).model_id
    assert of().seed != of(width=12).seed
    assert of().data == of(width=12).data


@nni.trace
class Traced(Dataset):
    def __init__(self, size=8):
        self.x = torch.arange(float(size)).unsqueeze(1).expand(-1, 64)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], 0


def test_a_traced_data_set_is_made_anew(translator):
    given = nni_spaces.evaluator()
    given.trace_kwargs["train_dataloaders"] = DataLoader(Traced(5), batch_size=2)
    given.trace_kwargs["val_dataloaders"] = DataLoader(Traced(size=3), batch_size=2)
    model = translated(translator, given)
    assert model.data.source == "cgo.nni.data:traced"
    train, validation = resolve(model.data.source)(**model.data.kwargs)
    assert (len(train), len(validation)) == (5, 3)


class Plain(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(64), 0


def changed(**given):
    evaluator = nni_spaces.evaluator()
    evaluator.trace_kwargs.update(given)
    return evaluator


class OwnClassification(Classification):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: None, "no evaluator"),
        (lambda: changed(max_epochs=None), "max_epochs"),
        (lambda: changed(accumulate_grad_batches=4), "trainer arguments accumulate_grad_batches"),
        (lambda: changed(criterion=nn.GaussianNLLLoss), "criterion GaussianNLLLoss"),
        (lambda: changed(criterion=nn.MSELoss), "'accuracy' is a metric of classes"),
        (lambda: changed(gradient_clip_algorithm="value"), "gradient_clip_algorithm"),
        (lambda: changed(precision=16), "precision 16"),
        (lambda: changed(datamodule=object()), "datamodule"),
        (lambda: changed(val_dataloaders=None), "val_dataloaders"),
        (lambda: changed(train_dataloaders=DataLoader(Plain())), "wrap its class with nni.trace"),
        (
            lambda: changed(train_dataloaders=DataLoader(Traced(), collate_fn=lambda rows: rows)),
            "collate_fn",
        ),
    ],
)
def test_what_is_not_translated_says_why(make, reason, translator):
    with pytest.raises(NotTranslated, match=reason):
        translated(translator, make())
