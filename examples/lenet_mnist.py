"""Prunes LeNet-300-100 on MNIST iteratively, rewinding to the initial weights.

This is the smallest complete loop, with plain `fit`:

    python examples/lenet_mnist.py --data-dir DIR
    tensorboard --logdir logs/lenet_mnist
"""

import argparse

import keras
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.experiments import datasets
from lottery_ticket_pruner.experiments.tensorboard import EventWriter


def lenet(input_shape):
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Flatten(),
            layers.Dense(300, activation="relu", name="fc_1"),
            layers.Dense(100, activation="relu", name="fc_2"),
            layers.Dense(10, activation="softmax", name="output"),
        ]
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--bs", type=int, default=128, help="batch size")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--prune_pc", type=float, default=0.2, help="share pruned per round")
    parser.add_argument("--prune_rounds", type=int, default=5)
    parser.add_argument("--data-dir", help="folder with MNIST's published files")
    parser.add_argument("--logs", default="logs/lenet_mnist", help="folder for TensorBoard logs")
    parser.add_argument("--quick", action="store_true", help="digits, two epochs, two rounds")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.prune_rounds = 2, 2

    data = datasets.load("digits" if args.quick else "mnist", args.data_dir)
    keras.utils.set_random_seed(0)
    model = lenet(data.input_shape)
    model.compile(
        keras.optimizers.Adam(args.lr), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)

    with EventWriter(args.logs) as log:
        log.graph(model)
        for number in range(args.prune_rounds + 1):
            if number:
                pruner.set_pretrained_weights()
                # The output layer has few weights, so it is pruned half as fast.
                rates = {"^output/": args.prune_pc / 2, "default": args.prune_pc}
                pruner.update_masks("large_final", rate=rates)
                pruner.rewind()
            history = model.fit(
                data.x_train,
                data.y_train,
                batch_size=args.bs,
                epochs=args.epochs,
                validation_data=(data.x_validation, data.y_validation),
                verbose=0,
            )
            loss, accuracy = model.evaluate(data.x_test, data.y_test, verbose=0)
            for epoch, value in enumerate(history.history["val_accuracy"]):
                log.scalar(f"val_accuracy/round_{number}", value, epoch)
            log.scalar("test_accuracy", accuracy, number)
            log.sparsity(model, number)
            sparsity = ml.sparsity_report(model).sparsity
            print(
                f"round {number}: {sparsity:7.2%} pruned, loss {loss:.4f}, accuracy {accuracy:.4f}"
            )

    print(ml.sparsity_report(model))


if __name__ == "__main__":
    main()
