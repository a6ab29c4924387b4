"""The README's example: six networks, trained in one process, one after another's metric."""

import cgo


def main() -> None:
    """Train six networks and load the best one's weights into a module of our own."""
    data = cgo.DataSpec("cgo.zoo:digits", batch_size=64)
    training = cgo.TrainingSpec(
        metrics=("accuracy",),
        optimizer="SGD",
        optimizer_kwargs={"lr": 0.05, "momentum": 0.9},
        epochs=3,
    )
    models = [
        cgo.Model("cgo.zoo:cnn", {"width": width}, data=data, training=training, seed=seed)
        for width in (8, 12)
        for seed in range(3)
    ]
    with cgo.CGOEngine() as engine:
        engine.submit_models(*models)
        engine.wait_models()
    for model in models:
        print(model.kwargs, model.seed, f"{model.metric:.4f}")

    from cgo import zoo

    winner = cgo.best(models)
    net = zoo.cnn(**winner.kwargs)
    net.load_state_dict(winner.state_dict())
    print(f"best: {winner.kwargs}, accuracy {winner.metric:.4f}")


if __name__ == "__main__":
    main()
