"""Writes the table of costs that ships with the package: of the benchmark's families and the zoo.

Run on a machine with nothing else to do; measurements of the user's own table are left out.
"""

import json
import tempfile
from pathlib import Path

import torch
from common import tuned_process

from cgo.bench import end_to_end, environment
from cgo.bench.families import FAMILIES
from cgo.cli.demo import candidates
from cgo.graph import restrict
from cgo.model import Model
from cgo.planner import Planner
from cgo.runtime.choice import rules_for
from cgo.runtime.cost_table import CostTable
from cgo.runtime.tuning import Tuner
from cgo.tuning import Tuning

CPU = torch.device("cpu")
OUT = Path(__file__).parent.parent / "runtime" / "costs_cpu.json"


def workloads() -> list[list[Model]]:
    """What is measured: every family at a few widths, and whole searches."""
    found = [build(count) for build in FAMILIES.values() for count in (8, 32)]
    return [*found, candidates(1), end_to_end.candidates(16, 1)]


def main() -> None:
    """Measure and write."""
    table = CostTable(None, CPU, shipped=False)
    for models in workloads():
        tuner = Tuner(table, CPU, rules_for(CPU), Tuning(share=1.0), 10**6)
        with tempfile.TemporaryDirectory() as folder:
            data = Planner().plan(models, Path(folder)).graph_data
        assert data is not None
        for key in data.data:
            ids = [entry.id for entry in data.models if entry.data == key]
            tuner(restrict(data.graph, models=set(ids)), ids)
        print(models[0].model_id, len(table.rows()), "rows", flush=True)
    rows = ",\n".join(json.dumps(row) for row in table.rows())
    text = json.dumps({"key": table.key, **environment()}, indent=1).removesuffix("\n}")
    OUT.write_text(f'{text},\n "rows": [\n{rows}\n]}}\n')


if __name__ == "__main__":
    tuned_process()
    main()
