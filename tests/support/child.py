"""Runs a search in a process of its own, for tests that kill or interrupt it.

`python -m support.child FOLDER EPOCHS`: prints each line of progress as it happens.
"""

import signal
import sys

import cgo
from cgo import AbstractGraphListener


class Printer(AbstractGraphListener):
    def on_metric(self, model, metric):
        print("final", model.model_id, flush=True)

    def on_intermediate_metric(self, model, metric):
        print("epoch", model.model_id, len(model.history), flush=True)

    def on_training_end(self, model, success):
        print("end", model.model_id, success, flush=True)


def models(epochs):
    data = cgo.DataSpec("support.small:slow_points", batch_size=8)

    def make(id_, epochs):
        training = cgo.TrainingSpec(metrics=("accuracy",), epochs=epochs)
        return cgo.Model(
            "support.small:mlp",
            {"hidden": 4 + epochs % 7, "dropout": 0.2},
            data=data,
            training=training,
            model_id=id_,
        )

    return [make("short", 1), make("long", epochs)]


def main():
    # A shell starts what it puts into the background with interrupts ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder, epochs = sys.argv[1], int(sys.argv[2])
    given = models(epochs)
    with cgo.CGOEngine(folder) as engine:
        engine.register_graph_listener(Printer())
        engine.submit_models(*given)
        try:
            engine.wait_models()
        except KeyboardInterrupt:
            print("interrupted", [model.status.value for model in given], flush=True)
    print("closed", flush=True)


if __name__ == "__main__":
    main()
