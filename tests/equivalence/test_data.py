"""Where data are kept and how inputs are augmented: merged trials against the plain loop."""

import numpy as np
import pytest
import torch
from support import augments
from support.merged import Case, Merged, assert_equal_float64

TRAINING = {"epochs": 3, "precision": "float64", "optimizer_kwargs": {"lr": 0.05}}


def augmented(module, seed):
    """What `DataSpec` documents, written out; for modules that draw from torch alone."""

    def augment(inputs, epoch, number):
        key = int(np.random.SeedSequence((seed, epoch, number)).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(key >> 1)
            return module(inputs)

    return augment


def cases(**fields):
    networks = [
        ("plain", "mlp", {}),
        ("convolutions", "cnn", {}),
        ("dropout", "mlp", {"dropout": 0.3}),
        ("opaque", "trap", {"kind": "multinomial"}),
    ]
    shared = {"data_seed": 4, "batch_size": 48, "training": TRAINING, **fields}
    return [Case(*network, seed=seed, **shared) for seed, network in enumerate(networks)]


def test_augmented_training_is_that_of_the_plain_loop(tmp_path):
    # An opaque lane is among the models, and the last batch is smaller.
    flips = {"augment": "support.augments:Flip"}
    found = cases(data=flips, augment=augmented(augments.Flip(), 4))
    merged = Merged(found, tmp_path)
    for case in found:
        assert_equal_float64(merged, case)


@pytest.mark.parametrize("source", ["digits", "paired"])
def test_resident_data_train_as_loaded_ones(source, tmp_path):
    factory = {"digits": "mlp", "paired": "two"}[source]
    case = Case("m", factory, source=source, data={"resident": True}, training=TRAINING)
    assert_equal_float64(Merged([case], tmp_path), case)
