"""Searches for the best way to a sparsity with Optuna: criterion, scope, rounds and retraining.

Each trial prunes a small network to the same sparsity. Optuna minimizes its loss on validation data
and writes all trials to a file, from which the same command resumes the search. The test accuracy
of the best trial is printed; it has no part in the choice:

    pip install "lottery-ticket-pruner[cli,optuna]"
    python examples/optuna_search.py --sparsity 0.95 --trials 30
    python examples/optuna_search.py --which_set mnist --data-dir DIR --steps 5000
"""

import argparse
from collections.abc import Sequence
from typing import Any

import keras
import optuna

from lottery_ticket_pruner import find_ticket
from lottery_ticket_pruner.experiments import datasets, networks

CRITERIA = ["large_final", "magnitude_increase", "movement", "large_final_same_sign"]


def prune(data: datasets.Dataset, options: argparse.Namespace, trial: Any) -> dict[str, Any]:
    """Returns the row of the pruned network: its sparsity, losses and accuracies."""
    keras.utils.set_random_seed(options.seed)
    model = networks.build("lenet-300-100", data.input_shape, data.classes)
    model.compile(
        networks.optimizer("adam", networks.LEARNING_RATE, options.steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    result = find_ticket(
        model,
        data.x_train,
        data.y_train,
        validation_data=(data.x_validation, data.y_validation),
        test_data=(data.x_test, data.y_test),
        sparsity=options.sparsity,
        steps=options.steps,
        seed=options.seed,
        controls=(),
        strategy=trial.suggest_categorical("strategy", CRITERIA),
        scope=trial.suggest_categorical("scope", ["layer", "global"]),
        rounds=trial.suggest_int("rounds", 1, 4),
        retraining=trial.suggest_categorical(
            "retraining", ["weight_rewinding", "learning_rate_rewinding"]
        ),
    )
    return result.rows[-1]


def main(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--which_set", default="digits", choices=datasets.IMAGES)
    parser.add_argument("--data-dir")
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--steps", type=int, default=600, help="training steps of each round")
    parser.add_argument("--trials", type=int, default=20, help="trials in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", default="optuna_search.log", help="file of all trials")
    options = parser.parse_args(arguments)
    data = datasets.load(options.which_set, options.data_dir)
    backend = optuna.storages.journal.JournalFileBackend(options.storage)
    study = optuna.create_study(
        # The trials of other options are other studies in the same file.
        study_name=f"{options.which_set}-{options.sparsity}-{options.steps}-{options.seed}",
        storage=optuna.storages.JournalStorage(backend),
        load_if_exists=True,
    )
    # With the same seed, a resumed search would begin with the trials that it already has.
    seed = options.seed + len(study.trials)
    study.sampler = optuna.samplers.TPESampler(seed=seed)

    def loss(trial: Any) -> float:
        row = prune(data, options, trial)
        trial.set_user_attr("test_accuracy", row["test_accuracy"])
        return float(row["validation_loss"])

    finished = len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))
    study.optimize(loss, max(0, options.trials - finished))
    best = study.best_trial
    choices = ", ".join(f"{name} {value}" for name, value in best.params.items())
    print(f"{len(study.trials)} trials; the best: {choices}")
    print(f"validation loss {best.value:.4f}, test accuracy {best.user_attrs['test_accuracy']:.2%}")
    return study


if __name__ == "__main__":
    main()
