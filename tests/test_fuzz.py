"""Any document is refused with an error of ours, or runs; 300 at a time, 10,000 in `make test-all`.

Documents start as real ones (`support.hostile`) and are changed at every level; or they stay whole,
and get a call of any operator with arguments that its schema takes (`support.calls_drawn`), so that
what the checks at the door let through is run, forward and backward.
"""

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from random import Random

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from support import hostile
from support.calls_drawn import insert_call

from cgo.allowed import ALLOWED_MODULES
from cgo.errors import CgoError
from cgo.operators import known

#: What documents may name: code whose arguments are changed has to check them.
ALLOWED = "support.hostile"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    documents = hostile.write_documents(folder)
    before = os.environ.get(ALLOWED_MODULES)
    os.environ[ALLOWED_MODULES] = ALLOWED
    yield documents, folder
    if before is None:
        del os.environ[ALLOWED_MODULES]
    else:
        os.environ[ALLOWED_MODULES] = before


def operators():
    """All that a document may hold."""
    schemas = torch._C._jit_get_all_schemas()
    names = {f"{s.name}.{s.overload_name or 'default'}" for s in schemas}
    names = {name.replace("aten::", "aten.") for name in names if name.startswith("aten::")}
    return sorted(filter(known, names))


#: Some that it may not.
REFUSED = ["aten.from_file.default", "aten.add_.Tensor", "aten._cudnn_rnn.default", "aten.no.op",
           "cgo.input", "cgo.random", "cgo.batch_norm", "cgo.constant", "os.system"]  # fmt: skip


@pytest.fixture(scope="module")
def counted():
    """How the cases ended; told when all have."""
    counts = Counter()
    yield counts
    print(f"\nfuzzed: {dict(counts)}")


def outcome(text, base, counts):
    folder = Path(tempfile.mkdtemp(prefix="cgo-fuzz-"))
    try:
        found = hostile.run(text, base, folder)
    finally:
        shutil.rmtree(folder)
    if isinstance(found, CgoError):
        counts["refused with an error of ours"] += 1
        return None
    ended = {event.model: event.value for event in found if event.kind == "ended"}
    good = sum(value["success"] for value in ended.values())
    kind = "all" if good == len(ended) else "some" if good else "none"
    counts[f"ran, {kind} of its models trained"] += 1
    return ended


DICE = st.integers(0, 2**64 - 1).map(Random)
QUICK = settings(
    max_examples=150,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
LONG = settings(QUICK, max_examples=5000)


def any_document(made, counts):
    documents, folder = made
    names = operators() + REFUSED * 3

    def check(dice):
        name = dice.choice(sorted(documents))
        outcome(hostile.mutated(documents[name], dice, names), folder / name, counts)

    return given(DICE)(check)


def any_call(made, counts):
    documents, folder = made
    names = operators()

    def check(dice):
        name = dice.choice(sorted(documents))
        document = copy.deepcopy(documents[name])
        if insert_call(document, dice, names) is None:
            return
        ended = outcome(json.dumps(document), folder / name, counts)
        if ended is not None:  # the call is one model's, and nobody else's
            (model,) = document["nodes"][-1]["owners"]
            others = {id_: value["error"] for id_, value in ended.items() if id_ != model}
            assert not any(others.values()), others

    return given(DICE)(check)


def test_any_document_is_refused_or_runs(made, counted):
    QUICK(seed(1)(any_document(made, counted)))()
    assert counted["refused with an error of ours"] > 20
    assert sum(counted.values()) >= 150


def test_any_call_is_refused_or_runs(made, counted):
    before = counted["ran, all of its models trained"]
    QUICK(seed(1)(any_call(made, counted)))()
    assert counted["ran, all of its models trained"] > before + 20


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand(made, counted):
    before = sum(counted.values())
    LONG(seed(2)(any_document(made, counted)))()
    LONG(seed(2)(any_call(made, counted)))()
    assert sum(counted.values()) - before > 9_900
