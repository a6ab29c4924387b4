"""NNI's hub of model spaces: four models of each of eight, all in one search."""

import contextlib
import warnings

import numpy
import pytest
import torch
from nni.mutable.exception import SampleValidationError
from nni.nas.evaluator.pytorch import Classification, DataLoader
from nni.nas.space import ModelStatus, SimplifiedModelSpace
from torch.utils.data import TensorDataset

import cgo
from cgo.nni import CGOExecutionEngine
from cgo.nni.translate import Translator

warnings.simplefilter("ignore")

SIZE, CLASSES = 32, 10


def spaces():
    from nni.nas.hub import pytorch as hub

    small = {"num_labels": CLASSES}
    return {
        "MobileNetV3Space": lambda: hub.MobileNetV3Space(width_multipliers=0.25, **small),
        "ProxylessNAS": lambda: hub.ProxylessNAS(width_mult=0.25, **small),
        "ShuffleNetSpace": lambda: hub.ShuffleNetSpace(channel_search=False, **small),
        "DARTS": lambda: hub.DARTS(width=4, num_cells=3, dataset="cifar"),
        "ENAS": lambda: hub.ENAS(width=4, num_cells=3, dataset="cifar"),
        "NasBench201": lambda: hub.NasBench201(
            stem_out_channels=4, num_modules_per_stack=1, **small
        ),
        "NasBench101": lambda: hub.NasBench101(
            stem_out_channels=8, num_stacks=2, num_modules_per_stack=1, **small
        ),
        "AutoFormer": lambda: hub.AutoFormer(
            search_embed_dim=(32, 48), search_depth=(2, 3), search_num_heads=(2, 4), img_size=SIZE,
            patch_size=8, **small,
        ),
    }  # fmt: skip


def evaluator():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(16, 3, SIZE, SIZE, generator=generator),
        torch.randint(0, CLASSES, (16,), generator=generator),
    )
    loader = DataLoader(data, batch_size=8, shuffle=True)
    return Classification(
        learning_rate=0.01, optimizer=torch.optim.SGD, train_dataloaders=loader,
        val_dataloaders=DataLoader(data, batch_size=8), max_epochs=1, num_classes=CLASSES,
        logger=False, enable_progress_bar=False, enable_checkpointing=False,
        accelerator="cpu", precision="64-true",
    )  # fmt: skip


def sampled(name, count=4):
    space = SimplifiedModelSpace.from_model(spaces()[name](), evaluator())
    found, dice = {}, numpy.random.RandomState(0)
    while len(found) < count:
        with contextlib.suppress(SampleValidationError):  # NAS-Bench-101 has invalid samples
            model = space.random(random_state=dice)
            found[str(model.sample)] = model
    return list(found.values())


def trained(models, folder, merge_size):
    engine = CGOExecutionEngine(folder, merge_size=merge_size, merge_always=True)
    try:
        engine.submit_models(*models)
        engine.wait_models()
        assert not engine.errors
        return engine.explain(), engine._cgo.reports
    finally:
        engine.shutdown()


@pytest.mark.long
@pytest.mark.timeout(1500)
def test_32_models_of_eight_spaces_are_merged_and_equal_their_solo_runs(tmp_path):
    names = list(spaces())
    models = [model for name in names for model in sampled(name)]
    assert len(models) == 32
    _, reports = trained(models, tmp_path / "merged", merge_size=32)
    (report,) = reports
    assert (report.models, report.captured, dict(report.opaque)) == (32, 32, {})
    assert report.loaders == 1
    assert all(model.status is ModelStatus.Trained for model in models)
    translator = Translator(tmp_path / "data")
    again = [model for name in names for model in sampled(name)]
    alone = [translator.model(model, lambda text: f"alone-{text}") for model in again]
    with cgo.BaseExecutionEngine(tmp_path / "alone", batch_operators=None) as engine:
        engine.submit_models(*alone)
        engine.wait_models()
    for model, single in zip(models, alone, strict=True):
        assert single.error is None
        assert model.metric == single.metric, single.model_id


@pytest.mark.parametrize("name", ["NasBench201"])
def test_a_space_of_the_hub(name, tmp_path):
    models = sampled(name, 2)
    explained, _ = trained(models, tmp_path, merge_size=2)
    assert explained[0].startswith("trial 0: 2 models, 2 captured")
