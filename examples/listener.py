"""Asynchronous use: a search that submits wider networks while it learns how narrow ones do."""

import cgo
from cgo import AbstractGraphListener


class Widening(AbstractGraphListener):
    """Answers each trained model with one of twice the width, until there are enough."""

    def __init__(self, engine, make):
        self.engine, self.make = engine, make
        self.trained = []

    def on_intermediate_metric(self, model, metric):
        print(f"{model.model_id}: epoch {len(model.history)}: {metric:.4f}")

    def on_metric(self, model, metric):
        print(f"{model.model_id}: final {metric:.4f}")

    def on_training_end(self, model, success):
        self.trained.append(model)
        if success and not self.engine.budget_exhausted():
            self.engine.submit_models(self.make(2 * model.kwargs["widths"][0]))


def main() -> None:
    """Train three networks, each submitted when the one before it has ended."""
    data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    training = cgo.TrainingSpec(metrics=("accuracy",), optimizer="Adam", epochs=2)

    def make(width):
        return cgo.Model(
            "cgo.zoo:mlp", {"widths": [width]}, data=data, training=training, model_id=f"w{width}"
        )

    with cgo.CGOEngine(max_models=3) as engine:
        search = Widening(engine, make)
        engine.register_graph_listener(search)
        engine.submit_models(make(8))
        while not engine.budget_exhausted() or len(search.trained) < 3:
            engine.wait_models(timeout_s=300)
    print("best:", cgo.best(search.trained))


if __name__ == "__main__":
    main()
