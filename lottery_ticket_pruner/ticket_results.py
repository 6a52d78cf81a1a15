"""The result of a search for a ticket, from which the model of any round can be had."""

import dataclasses
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import checks, optimizers
from lottery_ticket_pruner.tolerances import check_dense, check_tolerance, is_within, metric_of
from lottery_ticket_pruner.trained_rounds import TrainedRounds

_TEST = "test_"


@dataclasses.dataclass(frozen=True)
class TicketResult:
    """A ticket, and how it was found.

    Attributes:
        ticket: The masked model, with the masks of the last round and the weights trained under
            them. `restore` changes it to the model of another round.
            `ticket.set_weights(initial_weights)` turns it into the untrained ticket, because
            weights do not include masks.
        initial_weights: Weights that every round was rewound to, in the order of `get_weights`.
        masks: Masks after each round, by weight path. `masks[0]` are all ones.
        rows: One dict per round and arm, in the order they were trained: `round`, `arm`
            (`"dense"` in round 0, then `"ticket"` and the controls), `replicate`, `sparsity` (the
            share of pruned weights), with a structure of channels or filters `channels` (the share
            of them that is left), `test_<metric>` for each compiled metric and the loss (at
            the end of training), `validation_loss` (its minimum), `early_stop_step` (the step of
            this minimum, found afterwards), `seconds`. Ready for `pandas.DataFrame(rows)`.
        trained: The trained weights of each round, which `restore` reads.

    Example:
    ```python
    result = find_ticket(model, x, y, rounds=10, steps=1000, test_data=(x_val, y_val))
    ticket = result.restore(result.best_round(max_drop=0.01))
    ```
    """

    ticket: keras.Model
    # A notebook shows a result in its last line, and these would be thousands of numbers.
    initial_weights: list[np.ndarray] = dataclasses.field(repr=False)
    masks: list[dict[str, np.ndarray]] = dataclasses.field(repr=False)
    rows: list[dict[str, Any]]
    trained: TrainedRounds = dataclasses.field(default_factory=TrainedRounds, repr=False)

    def best_round(self, max_drop: float, metric: str | None = None, mode: str = "auto") -> int:
        """Returns the sparsest round whose ticket is at most `max_drop` worse than the dense model.

        Both are judged by `test_data` of the search. The best of many rounds looks better than it
        is on the data that chose it, so measure the ticket on other data afterwards.

        Args:
            max_drop: How much worse the metric may be, in its own unit: 0.01 is one point of
                accuracy. Negative if the ticket must be better.
            metric: Name of a metric, as in the results of `evaluate`. None for the first accuracy,
                or the loss if there is none.
            mode: `"max"`, `"min"`, or `"auto"` for the direction that Keras' callbacks know.

        Returns:
            The number of the round. 0, the dense model, if no ticket is good enough.

        Raises:
            ValueError: If the search had no test data, there is no such metric, its direction is
                unknown, it is not finite for the dense model, or `max_drop` accepts any model.
        """
        dense = _results(self.rows[0])
        if not dense:
            raise ValueError(
                "No round was measured: call `find_ticket` with `test_data`, or choose a round by "
                "other columns of `rows`."
            )
        if not checks.is_number(max_drop):
            raise ValueError(f"`max_drop` must be a number. Received: {max_drop!r}")
        judge = metric_of(dense, self.ticket, metric, mode)
        check_tolerance(judge, dense, max_drop)
        value = dense[judge.name]
        check_dense(judge, value, "test", max_drop)
        tickets = [row for row in self.rows if row["arm"] == "ticket"]
        within = (
            row["round"]
            for row in tickets
            if is_within(judge.drop(value, _results(row)[judge.name]), max_drop, value)
        )
        return max(within, default=0)

    def restore(self, number: int) -> keras.Model:
        """Sets the masks of a round and the weights trained under them in `ticket`.

        Nothing is trained. The optimizer is reset, and a learning-rate schedule starts from the
        beginning. Raw values of pruned weights, which no result depends on, are 0 afterwards.

        With `checkpoint`, the weights are read from its folder, from `trained-<round>.npz`. Without
        it, the result has them in memory, and takes four bytes for each weight that a round keeps
        in float32, besides one for each entry of its masks. With `pruned="freeze"`, frozen values
        are stored in full, as many as there are weights.

        Args:
            number: Number of the round. 0 for the dense model, -1 for the last round.

        Returns:
            `ticket`, whose compiled functions stay valid.

        Raises:
            ValueError: If there is no such round, or the model's layers or optimizer have changed.
            OSError: If the weights of the round are not there (any more).
            FileContentError: If their file is damaged, or belongs to another search. In all cases,
                the model is not changed.
        """
        if not checks.is_integer(number) or not -len(self.masks) <= number < len(self.masks):
            raise ValueError(f"There are rounds 0 to {len(self.masks) - 1}. Received: {number!r}")
        number = int(number) % len(self.masks)
        model, optimizer = self.ticket, self.ticket.optimizer
        if not optimizers.is_built_for(optimizer, model.trainable_variables):
            raise ValueError(
                f"The optimizer of {model.name!r} was built for other weights. Compile the model "
                "again."
            )
        fresh = optimizers.unbuilt_copy(optimizer)
        self.trained.restore(model, number, self.masks[number])
        optimizers.reset_optimizer(optimizer, fresh, model.trainable_variables)
        return model


def _results(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the results on the test data in a row, by the names of metrics."""
    return {
        name.removeprefix(_TEST): value for name, value in row.items() if name.startswith(_TEST)
    }
