"""The running search: which attempt is next, whether there is time for it, and its conclusion."""

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import masked_layers as ml
from lottery_ticket_pruner import notices, reconstruction
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.compression import metrics, sensitivity, steps
from lottery_ticket_pruner.compression.clock import Clock, OutOfTimeError, Stopwatch
from lottery_ticket_pruner.compression.conclusions import Judge, verdict
from lottery_ticket_pruner.compression.densities import Densities
from lottery_ticket_pruner.compression.early_ends import PARTS, outcome_is_clear
from lottery_ticket_pruner.compression.ladder import Attempt, Ladder
from lottery_ticket_pruner.compression.plan import Plan
from lottery_ticket_pruner.compression.result import PruneResult
from lottery_ticket_pruner.compression.states import Progress, State
from lottery_ticket_pruner.compression.steps import Workbench
from lottery_ticket_pruner.compression.training_state import is_trained
from lottery_ticket_pruner.divergence import DivergenceError
from lottery_ticket_pruner.tolerances import check_dense, is_within
from lottery_ticket_pruner.wording import DropText

_logger = logging.getLogger(__name__)

# Ratio of two densities at which a method ends, and that of the last one if there is time to spend.
_PRECISION = 1.2
_FINE = 1.05
_WITHOUT_TRAINING = 1.1
# Under "auto", the methods without training only find where training begins.
_COARSE = {"magnitude": 1.5, "sensitivity": 1.5, "one_shot": 2.0}
_TRAINS = ("iterative", "gradual", "channels")
# Seconds, and share of the time to spend, that a scan of the layers may take.
_SCAN_SECONDS, _SCAN_SHARE = 60.0, 0.1
# Columns of rows that only the search needs.
_INTERNAL = ("density", "load")
# Share of the weights below which fitting is not worth its time.
_LEAST_FITTED = 0.5
# Seconds that a fit may take even if a training takes less.
_FIT_SECONDS = 0.5
# Times that a model above the size is pruned a little further.
_TIGHTENED = 4
# A step of training computes about as much as so many evaluations of its examples.
_STEP = 3


@dataclasses.dataclass
class Search:
    """A running search.

    Args:
        bench: The model, the data and the plan.
        progress: What was found so far.
        notes: Sentences for the result.
        clock: The time that the search takes.
    """

    bench: Workbench
    progress: Progress
    notes: list[str]
    clock: Clock

    def __post_init__(self) -> None:
        earlier = sum(row["seconds"] for row in self._rows)  # All that earlier versions stored.
        self.clock.before = self.progress.facts.get("spent", earlier)
        # The attempt for which there was no time, as words.
        self._cut = ""

    @property
    def _plan(self) -> Plan:
        return self.bench.plan

    @property
    def _densities(self) -> Densities:
        return Densities(self.bench, self.progress.facts, self.clock)

    @property
    def _rows(self) -> list[dict[str, Any]]:
        return self.progress.rows

    def run(self) -> PruneResult:
        """Executes the search, or the rest of it, and returns the result."""
        if self._rows:  # Those of an interrupted search.
            if "densities" not in self.progress.facts:
                raise ValueError(
                    "This search was begun by an earlier version of this package. Choose another "
                    "folder, or delete this one to start over."
                )
            self.bench.validate()  # Only to measure how long it takes, which `_tell` needs.
            self.clock.reserve += self.bench.seconds_to_compare()
            self.clock.reserve += self.progress.facts.get("export", 0.0)
            self._warn_of_constant(self._rows[0]["validation"])
            for row in self._rows:
                self._tell(row)
        else:
            self._begin()
        self.bench.shares = self.progress.facts["shares"]
        try:
            self._run_stages()
        except KeyboardInterrupt:
            self._write()  # Counts the time of the attempt that is repeated.
            raise
        return self._conclude()

    def _run_stages(self) -> None:
        for stage in self._plan.stages:
            if self._cut:
                break
            if stage == "sensitivity":
                self._compare_allocations()
                continue
            if stage == "one_shot" and self._plan.method == "auto":
                if self.bench.share_fitted() < _LEAST_FITTED:
                    continue
                self._measure_training()
            self._climb(stage)

    def _write(self) -> None:
        self.progress.facts["spent"] = self.clock.spent
        self.progress.write()

    def _begin(self) -> None:
        """Trains the dense model if necessary, measures it, and finds the density of the goals."""
        started = time.perf_counter()
        bench, options = self.bench, self._plan.options
        trained = options.trained
        if trained is None:
            trained = bench.has_steps or is_trained(bench.model, bench.parts.train)
        if options.retraining == "weight_rewinding" and trained:
            raise ValueError(
                "Weights of a trained model cannot be rewound to their initial values, which are "
                'not known: use retraining="learning_rate_rewinding", or pass the untrained model.'
            )
        if not trained:
            self._densities.check(State.of(bench.model))
            bench.train_dense(self._warn_of_dense())
        dense = State.of(bench.model)
        value = bench.validate()
        if (tolerance := self._plan.goals.tolerance) is not None:
            check_dense(bench.metric, value, "validation", tolerance)
        self._warn_of_constant(value)
        self.clock.reserve += bench.seconds_to_compare()
        self.progress.facts |= {"trained": trained, "dense": "0", "best": "0"}
        self._densities.find(dense)
        self.progress.keep("0", dense)
        self._record("dense", bench.density, value, started)

    def _warn_of_constant(self, dense: float) -> None:
        """Warns if a model that ignores its inputs is within the tolerance of the dense one."""
        metric, tolerance = self.bench.metric, self._plan.goals.tolerance
        if tolerance is None:
            return
        targets = self.bench.parts.validation[1]
        text = metrics.warning_of_constant(metric, dense, targets, tolerance)
        if text is not None:
            notices.warn(text)
            self.notes.append(text)

    def _climb(self, stage: str) -> None:
        """Executes the attempts of a method."""
        for _ in range(_TIGHTENED):
            ladder = self._ladder(stage)
            while (density := ladder.following(self._tried(stage))) is not None:
                if self._fitting_is_slow(stage):
                    return
                if self._is_late(stage):
                    self._cut = self._words(stage, density)
                    return
                self._attempt(stage, density)
                if self._cut:
                    return
            if not self._tighten(ladder.best(self._tried(stage))):
                return

    def _measure_training(self) -> None:
        """Measures how long a training takes, which is the most that a fit may take."""
        facts = self.progress.facts
        if "training" not in facts and facts["trained"] and self.clock.left > 0:
            self.progress.state(facts["dense"]).restore(self.bench.model)
            with contextlib.suppress(OutOfTimeError):
                facts["training"] = self.bench.seconds_to_train(self._check_time)
            self._write()

    def _fitting_is_slow(self, stage: str) -> bool:
        """Returns whether fitting was given up because it took longer than training."""
        return stage == "one_shot" and self.progress.facts.get("gave_up", False)

    def _compare_allocations(self) -> None:
        """Scans the layers, and prunes as far as magnitude failed by what the scan found."""
        facts, bench = self.progress.facts, self.bench
        if "scan" not in facts:
            minutes = self._plan.minutes
            seconds = _SCAN_SECONDS if minutes is None else _SCAN_SHARE * 60 * minutes
            self.progress.state(facts["dense"]).restore(bench.model)
            limit = min(seconds, _SCAN_SECONDS, self.clock.left)
            found = sensitivity.scan(bench.model, bench.parts.validation, bench.metric, limit)
            facts["scan"] = dataclasses.asdict(found)
            self._write()
        failed = [one.density for one in self._tried("magnitude") if not one.accepted]
        if failed and facts["scan"]["complete"] and not self._tried("sensitivity"):
            if self.clock.left < 0:
                self._cut = self._words("sensitivity", max(failed))
            else:
                self._attempt("sensitivity", max(failed))

    @property
    def _scan_helps(self) -> bool:
        """True if pruning by the scan lost less than pruning by magnitude at the same density."""
        drops = {(row["method"], row["density"]): row["drop"] for row in self._rows}
        return any(
            drop < drops["magnitude", density]
            for (method, density), drop in drops.items()
            if method == "sensitivity"
        )

    def _ladder(self, stage: str) -> Ladder:
        stages, rate = self._plan.stages, self._plan.options.rate
        earlier = ("dense", *stages[: stages.index(stage)])
        rows = [row for row in self._rows if row["method"] in earlier and row["accepted"]]
        target = self.progress.facts["target"]
        precision = _FINE if self._plan.minutes is not None else _PRECISION
        if stage not in _TRAINS:
            precision = _COARSE[stage] if self._plan.method == "auto" else _WITHOUT_TRAINING
        if stage == "gradual" and target is not None and target < 1:
            rate = 1 - target  # A single training to the target.
        return Ladder(
            rate=rate,
            precision=precision,
            target=target,
            lowest=self.bench.lowest,
            start=min((row["density"] for row in rows), default=1.0),
            size=None if self.bench.prunes_channels else self.bench.size,
        )

    def _tried(self, stage: str) -> list[Attempt]:
        return [
            Attempt(row["density"], row["accepted"]) for row in self._rows if row["method"] == stage
        ]

    def _attempt(self, stage: str, density: float) -> None:
        """Prunes the best model so far to a density, trains and measures it."""
        started, number = time.perf_counter(), len(self._rows)
        bench, facts = self.bench, self.progress.facts
        continues = stage in ("iterative", "channels")
        self.progress.state(facts["best" if continues else "dense"]).restore(bench.model)
        by_scan = stage == "sensitivity" or self._scan_helps
        bench.scan = facts["scan"]["rows"] if by_scan else None
        bench.steps_trained = 0
        try:
            if stage == "gradual":
                bench.prune_gradually(density, number, self._check_time)
            else:
                with reconstruction.checked(functools.partial(self._check_fit, Stopwatch())):
                    bench.prune(density, reconstruct=stage == "one_shot")
            if continues:
                bench.retrain(number, self._ends(density))
        except OutOfTimeError:
            if self.clock.left < 0:
                self._cut = self._words(stage, density)
            else:  # Fitting took too long.
                facts["gave_up"] = True
            self._write()  # What the attempt took is spent, even without a row of it.
            return
        except (DivergenceError, ValueError) as error:
            if isinstance(error, ValueError) and not bench.prunes_channels:
                raise
            self._record(stage, density, None, started, note=getattr(error, "found", str(error)))
            return
        value = bench.validate()
        if self._accepts(self._drop(value)):
            self.progress.keep(str(number), State.of(bench.model))
            facts["best"] = str(number)
        self._record(stage, density, value, started)

    def _check_time(self, done: int, steps: int) -> bool:
        self.clock.check()
        return False

    def _check_fit(self, watch: Stopwatch) -> None:
        """Raises an error if the time is over, or training would probably have been quicker."""
        self.clock.check()
        limit = max(self._seconds_of("iterative"), _FIT_SECONDS)
        if self._plan.method == "auto" and watch.seconds > limit:
            raise OutOfTimeError

    @property
    def _trainings_may_end(self) -> bool:
        """True if a training may end before its last step, because its outcome is clear."""
        may_end = self._plan.options.retraining == "learning_rate_rewinding"
        return may_end and self._plan.goals.tolerance is not None and self.bench.shows_weights

    def _ends(self, density: float) -> Callable[[int, int], bool]:
        """Returns a function that says, from the steps done and all steps, if a training ends."""
        tolerance, target = self._plan.goals.tolerance, self.progress.facts["target"]
        # The model that reaches the target is the result, so it is trained to the end.
        is_last = target is not None and density <= self._ladder(self._plan.stages[-1]).rounded(
            target
        )
        drops: list[float] = []

        def ends(done: int, steps: int) -> bool:
            self.clock.check()
            if tolerance is None or is_last or not self._trainings_may_end:
                return False
            if PARTS * done < len(drops) * steps:
                return False
            drops.append(self._drop(self.bench.validate()))
            return outcome_is_clear(
                drops, tolerance, decays=self.bench.decays, examples=self.bench.examples_counted
            )

        return ends

    def _warn_of_dense(self) -> Callable[[int, int], bool]:
        """Returns a listener that says if the training of the dense model takes all the time."""
        started, minutes = time.perf_counter(), self._plan.minutes

        def ends(done: int, steps: int) -> bool:
            nonlocal minutes
            seconds = (time.perf_counter() - started) / max(done, 1) * steps
            # The first part includes compilation.
            if minutes is not None and done > steps / 10 and seconds > 60 * minutes:
                notices.warn(
                    f"The dense model is not trained, and its training alone will probably take "
                    f"{seconds / 60:.2g} minutes, more than minutes={minutes:g}. It is finished, "
                    "because there is nothing to prune before."
                )
                minutes = None
            return False

        return ends

    def _words(self, stage: str, density: float) -> str:
        """Returns what there was no time for."""
        later = self._plan.stages[self._plan.stages.index(stage) + 1 :]
        text = f"{stage.replace('_', ' ')} pruning to {1 - density:.1%}"
        if later:
            text += f", then {', '.join(name.replace('_', ' ') for name in later)}"
        return text

    def _tighten(self, best: float) -> bool:
        """Lowers the target if a model that reached it is above the size, and says whether."""
        size, facts = self._plan.goals.size, self.progress.facts
        served = self._rows[int(facts["best"])]["size"]
        if size is None or served is None or served <= size:
            return False
        facts["densities"]["size"] = best * size / served * 0.99
        self._densities.share_out()
        self.bench.shares = facts["shares"]
        return True

    def _record(
        self, method: str, density: float, value: float | None, started: float, note: str = ""
    ) -> None:
        drop, size, bench = None, None, self.bench
        if value is not None:
            drop = self._drop(value) if self._rows else 0.0
            if "size" in self.progress.facts["densities"] and self._judge.reached("size", density):
                size = bench.served_size()
        row = {
            "step": len(self._rows),
            "method": method,
            "density": density,
            "sparsity": ml.sparsity_report(bench.model).sparsity,
            "macs": bench.macs_left(),
            "latency": self._milliseconds if value is not None else None,
            "size": size,
            "validation": value,
            "drop": drop,
            "accepted": drop is not None and (not self._rows or self._accepts(drop)),
            "misses": ", ".join(
                self._judge.misses(density, size=size, in_time=bench.within_latency(density))
            ),
            "steps": bench.steps_trained,
            "seconds": time.perf_counter() - started,
            "load": bench.load,
            "note": note,
        }
        self._rows.append(row)
        self._write()
        self._tell(row)

    @property
    def _milliseconds(self) -> float | None:
        """Latency of the model as it is now, if there is a goal of latency."""
        return self.bench.milliseconds if self._rows else self.progress.facts.get("milliseconds")

    @property
    def _judge(self) -> Judge:
        rounded = self._ladder(self._plan.stages[-1]).rounded
        return Judge(self._plan.goals, self.progress.facts, rounded)

    def _drop(self, value: float) -> float:
        return self.bench.metric.drop(self._rows[0]["validation"], value)

    def _accepts(self, drop: float) -> bool:
        return self._plan.goals.accepts(drop, self._rows[0]["validation"])

    def _tell(self, row: dict[str, Any]) -> None:
        _logger.info("%s", row)
        if self._plan.options.on_row is not None:
            more = {"elapsed": self.clock.spent, "remaining": self._remaining()}
            self._plan.options.on_row(row | more | {"metric": self.bench.metric.name})

    def _is_late(self, stage: str) -> bool:
        """Returns whether the next attempt would probably exceed the time."""
        seconds = [row["seconds"] for row in self._rows if row["method"] == stage]
        export = self.progress.facts.get("export", 0.0)
        return self.clock.left < max(seconds, default=self._seconds_of(stage)) + export

    def _remaining(self) -> float:
        """Returns the seconds that the rest of the search will probably take."""
        methods = [row["method"] for row in self._rows]
        stages = [stage for stage in self._plan.stages if stage != "sensitivity"]
        now = max((stages.index(method) for method in methods if method in stages), default=0)
        total = 0.0
        for stage in stages[now:]:
            if count := self._ladder(stage).expected(self._tried(stage)):
                total += count * self._seconds_of(stage)
        return max(min(total, self.clock.left), 0.0)

    def _seconds_of(self, stage: str) -> float:
        """Returns how long an attempt of a method probably takes, from what was measured so far.

        The first fit is given up when it takes longer than a training, so 0 is not a promise.
        """
        seconds = [row["seconds"] for row in self._rows if row["method"] == stage]
        if seconds:
            return sum(seconds) / len(seconds)
        if stage not in _TRAINS:
            return 0.0
        epochs = self.bench.epochs_of(stage)
        if not self.progress.facts["trained"]:
            return float(self._rows[0]["seconds"]) * epochs / steps.dense_epochs(self.bench.epochs)
        if (known := self.progress.facts.get("training")) is not None:
            return float(known)
        counts = self.bench.parts.counts()
        once = self.bench.seconds_to_validate
        return _STEP * once * epochs * counts["train"] / counts["validation"]

    def _conclude(self) -> PruneResult:
        """Compares the best model with the dense one on the test data."""
        bench, facts, rows = self.bench, self.progress.facts, self._rows
        test = bench.parts.test
        self.progress.state(facts["dense"]).restore(bench.model)
        dense = metrics.Outcome.of(bench.metric, bench.model, test)
        self.progress.state(facts["best"]).restore(bench.model)
        bench.reset_optimizer()
        model = bench.finished()
        pruned = metrics.Outcome.of(bench.metric, model, test)
        comparison = metrics.compare(bench.metric, dense, pruned, bench.parts.counts()["test"])
        best = rows[int(facts["best"])]
        if "size" in facts["densities"] and best["size"] is None:
            best["size"] = bench.served_size()
        meets = not best["misses"] if facts["densities"] else best["method"] != "dense"
        named = {"of": bench.metric.name}
        sentences = [self._judge.conclusion(best | named, rows), self._words_about_time()]
        if facts["best"] != facts["dense"]:
            sentences.append(verdict(self._plan.goals, comparison))
        return PruneResult(
            model=model,
            rows=[{k: v for k, v in row.items() if k not in _INTERNAL} for row in rows],
            scan=list(facts.get("scan", {}).get("rows", [])),
            test=comparison,
            sparsity=best["sparsity"],
            higher_is_better=bench.metric.higher_is_better,
            tolerance=self._plan.goals.tolerance,
            meets_goals=meets,
            conclusion=" ".join(filter(None, sentences)),
            notes=self._notes(),
            cautions=self._cautions(),
        )

    def _words_about_time(self) -> str:
        text = []
        if self._cut:
            text.append(
                f"The search ended early, because of minutes={self._plan.minutes:g}. There was "
                f"no time for {self._cut}."
            )
        if self.clock.left + self.clock.reserve < 0:
            text.append(f"It took {self.clock.spent / 60:.2g} minutes nevertheless.")
        return " ".join(text)

    def _cautions(self) -> tuple[str, ...]:
        return (*self.bench.parts.notes, *self.notes)

    def _notes(self) -> tuple[str, ...]:
        bench, plan = self.bench, self._plan
        notes = [*self._cautions()]
        if self.progress.facts["trained"]:
            notes.append("The model was trained already, and is compared as it was.")
        else:
            notes.append(
                f"The model was not trained. It was trained for {steps.dense_epochs(bench.epochs)} "
                "epochs first."
            )
        last = plan.stages[-1]
        trained = {row["method"] for row in self._rows if row["validation"] is not None}
        if last in _TRAINS and last in trained:
            how = plan.options.retraining.replace("_", " ")
            at_most = "at most " if last != "gradual" and self._trainings_may_end else ""
            epochs = bench.epochs_of(last)
            unit = "epoch" if epochs == 1 else "epochs"
            notes.append(f"Each step trained for {at_most}{epochs} {unit} ({how}).")
            if at_most:
                notes.append(
                    "A training ended when the drop was at most half of the tolerance"
                    f"{'' if self.bench.decays else ', or was not about to come near it'}."
                )
        if self._plan.method == "auto" and "one_shot" in plan.stages and self._tried(last):
            share = bench.share_fitted()
            if share < _LEAST_FITTED:
                notes.append(
                    f"Fitting without training was left out, because only {share:.0%} of the "
                    "weights are in layers whose weights can be fitted."
                )
        if self._fitting_is_slow("one_shot"):
            notes.append(
                "Fitting without training was given up when it took longer than training would."
            )
        notes += [*self._notes_of_scan(), *self._notes_of_latency()]
        gain = -min((row["drop"] for row in self._rows if row["drop"] is not None), default=0.0)
        expected = max(plan.goals.tolerance or 0.0, 0.0)
        if gain > expected and not is_within(gain, expected, self._rows[0]["validation"]):
            better = DropText.of(bench.metric.name, self._rows[0]["validation"]).text(gain)
            notes.append(
                f"A pruned model was better than the dense one by {better} on the validation "
                "data. Unless this is chance, the dense model was not trained to the end, so part "
                "of what pruning costs is hidden by training on."
            )
        return tuple(notes)

    def _notes_of_scan(self) -> list[str]:
        if (scan := self.progress.facts.get("scan")) is None:
            return []
        if not scan["complete"]:
            return [
                "There was not enough time to prune each layer alone, so the sparsity was divided "
                "among the layers by magnitude (LAMP)."
            ]
        compared = {row["method"] for row in self._rows} >= {"magnitude", "sensitivity"}
        if not compared:
            return []
        if self._scan_helps:
            return [
                "The sparsity was divided among the layers by how much each loses alone, because "
                "the model lost less then than by magnitude (LAMP) at the same sparsity."
            ]
        return [
            "The sparsity was divided among the layers by magnitude (LAMP), because the model did "
            "not lose less by how much each layer loses alone."
        ]

    def _notes_of_latency(self) -> list[str]:
        if self._plan.goals.latency is None:
            return []
        latency = Latency.of(self._plan.goals.latency)
        return [
            "Zeros inside a kernel do not make a model faster, so channels are removed. The "
            f"latency is that of a call of the Keras model with a batch of {latency.batch_size} on "
            f"this machine. The dense model took {self.progress.facts['milliseconds']:.3g} ms."
        ]
