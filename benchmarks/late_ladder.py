"""Adds up a ticket search with controls, with and without trainings of the weights that are left.

    python -m benchmarks.late_ladder [--data-dir DIR] [--rounds 20] [--steps 20000]

A whole search takes hours of processor time, so its trainings are measured in parts. LeNet-300-100
on MNIST (without --data-dir on as many random images): a search with trainings of `--search-steps`
makes the masks of all rounds. In every second round, the ticket and a random mask of the same
counts are trained for `--measured-steps`, in turns with all weights and as `find_ticket` trains
them when each training takes --steps, with its validation. Both are one program's second call; the
seconds of its first are added once per mask. Other rounds are interpolated. Processor seconds, of
one thread on TensorFlow. Pruning and tests, which are the same for both, are left out.
"""

import argparse
import sys
import time

import numpy as np

from benchmarks.ladder import BATCH_SIZE, data
from benchmarks.late_tickets import one_thread, tickets

GOAL = 0.65
EVERY = 2


class Search:
    """A masked model, its data, and the plan of the trainings of a search.

    Args:
        model: The compiled masked model.
        examples: The data set.
        steps: Number of steps of each training of the search.
        measured: Number of steps of a measured training.
    """

    def __init__(self, model, examples, steps, measured):
        from lottery_ticket_pruner import LotteryTicketPruner
        from lottery_ticket_pruner.training import ArrayDataset

        self.pruner = LotteryTicketPruner(model)
        self.model, self.steps, self.measured = model, steps, measured
        self.data = ArrayDataset.of(examples.x_train, examples.y_train)
        self.validation = ArrayDataset.of(examples.x_validation, examples.y_validation)

    def seconds(self, masks):
        """Returns the seconds of a training with these masks: all weights, those left, compiling.

        Args:
            masks: Masks of the ticket or of a control.
        """
        import masked_layers as ml
        from lottery_ticket_pruner import training

        ml.set_masks(self.model, masks)
        share = self.measured / self.steps
        # As in a training of all steps. The thresholds are in steps of the whole training.
        thresholds = {"all": float("inf"), "left": training.EngineSettings().least_savings * share}
        training.settings.least_savings = thresholds["left"]
        first = self._train()
        times = {}
        for kind, threshold in thresholds.items():
            training.settings.least_savings = threshold
            times[kind] = self._train()
        compiling = max(0.0, first - times["left"])
        return times["all"] / share, times["left"] / share, compiling

    def _train(self):
        from lottery_ticket_pruner import training

        self.pruner.rewind()
        plan = training.TrainingPlan(
            steps=self.measured, batch_size=BATCH_SIZE, eval_every=500, deterministic=True
        )
        # A search looks at the model after each evaluation and stretch.
        listeners = training.Listeners(
            on_progress=lambda steps: None, on_evaluation=lambda step, results: None
        )
        started = time.process_time()
        training.train_by_plan(self.model, self.data, plan, self.validation, listeners)
        return time.process_time() - started


def main(arguments=None):
    """Runs the benchmark; returns 1 if the goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.late_ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's published files")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each training")
    parser.add_argument("--search-steps", type=int, default=1_000, help="steps that make masks")
    parser.add_argument("--measured-steps", type=int, default=500)
    options = parser.parse_args(arguments)
    one_thread()

    from lottery_ticket_pruner import arms

    examples = data(options.data_dir)
    model, masks = tickets(examples, options.rounds, options.search_steps)
    search = Search(model, examples, options.steps, options.measured_steps)
    search.seconds(masks[0])  # Compiles the program for all weights.
    numbers = sorted({0, *range(options.rounds, 0, -EVERY)})
    print(f"{examples.name}, processor seconds of a training of {options.steps:,} steps:")
    measured: dict[str, list[tuple[float, ...]]] = {"ticket": [], "random mask": []}
    for number in numbers:
        ticket = masks[number]
        kept = sum(int(mask.sum()) for mask in ticket.values())
        left = kept / sum(mask.size for mask in ticket.values())
        shuffled = arms.shuffled(ticket, (0, number), together=False)
        for arm, arm_masks in (("ticket", ticket), ("random mask", shuffled)):
            dense, late, compiling = search.seconds(arm_masks)
            measured[arm].append((dense, late, compiling))
            print(
                f"  {left:6.1%} left, {arm}: all weights {dense:.1f}, weights that are left "
                f"{late:.1f}, and {compiling:.1f} for compiling",
                flush=True,
            )
    rounds = np.arange(options.rounds + 1)
    ticket, random = (
        np.array(
            [np.interp(rounds, numbers, column) for column in zip(*measured[arm], strict=True)]
        )
        for arm in measured
    )
    # The random reinitialization has the masks of the ticket, and therefore its program.
    arms_of = {
        "ticket": ticket,
        "random reinit": ticket[:, 1:] * [[1], [1], [0]],
        "random mask": random[:, 1:],
    }
    met = False
    for names in (("ticket", "random reinit"), tuple(arms_of)):
        dense = sum(arms_of[name][0].sum() for name in names)
        late = sum(arms_of[name][1:].sum() for name in names)
        compiling = sum(arms_of[name][2].sum() for name in names)
        met = late / dense <= GOAL
        print(
            f"{', '.join(names)}: all weights {dense:.0f} s, weights that are left {late:.0f} s, "
            f"{compiling:.0f} s of it compiling; ratio {late / dense:.2f}, goal {GOAL}: "
            + ("met" if met else "missed")
        )
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
