"""A search on NNI's local service, in a process that tests kill: EXPERIMENT NNI_FOLDER EPOCHS."""

import sys

from support.nni_spaces import DigitsSpace, evaluator

from cgo.nni import CGOExecutionEngine, NniPlatform

if __name__ == "__main__":
    import nni
    from nni.nas.space import SimplifiedModelSpace
    from nni.nas.strategy import GridSearch

    folder, nni_folder, epochs = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rate = nni.choice("lr", [0.01])
    space = SimplifiedModelSpace.from_model(
        DigitsSpace(widths=(8, 12)), evaluator(rate, epochs=epochs)
    )
    platform = NniPlatform(working_directory=nni_folder)
    engine = CGOExecutionEngine(folder, merge_size=4, max_models=8, platform=platform)
    GridSearch(seed=0)(space, engine)
    engine.wait_models()
    print({engine.name_of(m): (m.status.value, m.metric) for m in engine.list_models()}, flush=True)
    engine.shutdown()
