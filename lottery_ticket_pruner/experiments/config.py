"""The configuration of an experiment: its options with all choices made, and its folder's name."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any, TypeVar

from _lottery_ticket import experiments as options
from _lottery_ticket import unknown
from _lottery_ticket.refusals import option
from lottery_ticket_pruner import criteria, selection, structures
from lottery_ticket_pruner.checks import require_extra, share_meant
from lottery_ticket_pruner.experiments import datasets, networks, own
from lottery_ticket_pruner.experiments.arguments import EXECUTION, rates_of
from lottery_ticket_pruner.experiments.identifiers import identifier_of, resolved
from lottery_ticket_pruner.fingerprints import of_json
from lottery_ticket_pruner.search_plans import (
    ControlPlan,
    PruningPlan,
    SearchPlan,
    retraining_treatment,
    taken,
)
from lottery_ticket_pruner.training import TrainingPlan

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a run for the options that its configuration leaves open."""

    network: str
    learning_rate: float
    steps: int
    rounds: int
    rate: float = 0.2
    conv_share: float = 0.5
    batch_size: int = 60
    optimizer: str = "adam"
    scope: str | None = None


# Scopes that have a single rate.
_TOGETHER = ("global", "isomorphic")

# Frankle & Carbin, arXiv 1803.03635, figure 2. Convolutions are pruned by `conv_share` of `rate`,
# the output layer by half of it.
_RECIPES = {
    "lenet-300-100": Recipe("lenet-300-100", 1.2e-3, 50_000, 20),
    "conv-2": Recipe("conv-2", 2e-4, 20_000, 20),
    "conv-4": Recipe("conv-4", 3e-4, 25_000, 20),
    "conv-6": Recipe("conv-6", 3e-4, 30_000, 20, conv_share=0.75),
    # Frankle et al., arXiv 1912.05671, table 2: all layers are ranked together.
    "resnet-20": Recipe(
        "resnet-20", 0.1, 72_000, 20, batch_size=128, optimizer="sgd", scope="global"
    ),
}
# The recipe of small data sets, as of `lottery-ticket run` without arguments: down to 2 % in nine
# large rounds, with three seeds in less than a minute.
_SMALL = Recipe("lenet-300-100", 2e-3, 600, 9, rate=0.36)


class Experiment:
    """Base class of the configurations of all experiments, which are dataclasses."""

    data: str
    network: str | None
    out: Path | None

    @property
    def subject(self) -> str:
        """Part of the name that describes a resolved configuration."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """Name of a resolved configuration: readable, and different for different runs."""
        digest = of_json(choices(self.to_dict()))[:8]
        network = datasets.label(chosen(self.network))
        return f"{datasets.label(self.data)}-{network}-{self.subject}-{digest}"

    @property
    def folder(self) -> Path:
        """Folder that a resolved configuration writes to."""
        return self.out or Path("runs") / self.name

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as JSON data."""
        values = dataclasses.asdict(self)  # type: ignore[call-overload]  # Subclasses are ones.
        for name in ("overwrite", *EXECUTION):  # These belong to a single call, not to the run.
            values.pop(name, None)
        if not values["devices"]:  # The form of all runs that were made before this option.
            del values["devices"]
        return json.loads(json.dumps(values, default=str))


@dataclasses.dataclass(frozen=True)
class RunConfig(options.RunOptions, Experiment):
    """Options of `lottery-ticket run`."""

    def resolve(self, training_images: int) -> "RunConfig":
        """Returns the same configuration with all choices made.

        Args:
            training_images: Number of training images, to convert epochs to steps.

        Raises:
            ValueError: If options contradict each other, a name is unknown, or a number is out of
                range.
        """
        if self.log != "tensorboard":
            require_extra(self.log)
        recipe = self._recipe()
        criterion = resolved("strategy", self.strategy)
        resolved("kept", self.kept, functools.partial(retraining_treatment, self.retraining))
        resolved("pruned", self.pruned)
        structure = self._structure()
        fixed = structure is not None and structure.kept is not None
        rounds = chosen(self.rounds, 1 if fixed else recipe.rounds)
        self._check_numbers(rounds)
        batch_size = chosen(self.batch_size, recipe.batch_size)
        steps_per_epoch = -(-training_images // batch_size)
        epochs = None if self.epochs is None else self.epochs * steps_per_epoch
        steps = chosen(self.steps, epochs, recipe.steps)
        amounts = self._amounts(recipe, criterion, structure)
        rewind_to = parse_steps(self.rewind_to, steps_per_epoch)
        if rewind_to >= steps:
            raise ValueError(f"--rewind-to {self.rewind_to} is not before the end, step {steps}.")
        # None stands for what the network is compiled with, which is not known here.
        is_own = networks.is_own(recipe.network)
        return dataclasses.replace(
            self,
            network=recipe.network,
            rounds=rounds,
            steps=steps,
            epochs=None,
            batch_size=batch_size,
            optimizer=self.optimizer if is_own else chosen(self.optimizer, recipe.optimizer),
            learning_rate=(
                self.learning_rate if is_own else chosen(self.learning_rate, recipe.learning_rate)
            ),
            eval_every=chosen(self.eval_every, min(500, max(1, steps // 10))),
            rewind_to=f"{rewind_to}it",
            **amounts,
        )

    @property
    def subject(self) -> str:
        """Name of the criterion, and of the structure."""
        names = filter(None, (self.strategy, self.structure))
        return "-".join(
            datasets.label(name) if own.is_location(name) else name.replace(":", "of")
            for name in names
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as JSON data."""
        values = super().to_dict()
        if self.structure is None:  # The form of all runs that were made before this option.
            del values["structure"]
        if self.log == "tensorboard":
            del values["log"]
        return values

    @property
    def amount(self) -> dict[str, Any]:
        """The `rate` or `sparsity` of a resolved configuration, as arguments of `find_ticket`."""
        if self.final_sparsity is not None:
            if self.output_rate is None:
                return {"sparsity": self.final_sparsity}
            return {"sparsity": {"^output/": self.output_rate, "default": self.final_sparsity}}
        if self.rate is None:  # The structure sets the sparsity.
            return {}
        rates = {} if self.output_rate is None else {"^output/": self.output_rate}
        if isinstance(self.rate, tuple):
            return {"rate": rates | rates_of(self.rate, 0)}
        if self.scope in _TOGETHER or networks.is_own(chosen(self.network)):
            return {"rate": self.rate}
        rates["default"] = self.rate
        if networks.has_convolutions(chosen(self.network)):
            rates["^conv_"] = chosen(self.conv_rate)
        return {"rate": rates}

    @property
    def counts_channels(self) -> bool:
        """True if rows of results contain the share of channels or filters that is left."""
        structure = self._structure()
        return structure is not None and (structure.coupled or structure.whole_outputs)

    def search_plan(self, replicate: int) -> SearchPlan:
        """Returns the plan of a resolved configuration for a replicate."""
        rewind_to = parse_steps(self.rewind_to, 1)
        fields = ("strategy", "structure", "kept", "pruned")
        named = {name: identifier_of(name, getattr(self, name)) for name in fields}
        return SearchPlan(
            training=training_plan(self, self.seeds[replicate]),
            pruning=taken(PruningPlan, self, rewind_to=rewind_to, **named, **self.amount),
            control=taken(ControlPlan, self, control_rounds=self.control_rounds or None),
            replicate=replicate,
        )

    def _recipe(self) -> Recipe:
        named = datasets.NAMED.get(self.data)
        if named is None and not datasets.is_own(self.data):
            unknown.check_data(self.data)
        network = self.network or (named.network if named else "lenet-300-100")
        if networks.is_own(network):
            recipe = _SMALL if named and named.is_small else _RECIPES["lenet-300-100"]
            return dataclasses.replace(recipe, network=network)
        unknown.check_network(network)
        if named and not named.is_image and networks.has_convolutions(network):
            raise ValueError(f"--network {network} needs images, and {self.data} has none.")
        if named and named.is_small and network == _SMALL.network:
            return _SMALL
        return _RECIPES[network]

    def _check_numbers(self, rounds: int) -> None:
        for name in ("rounds", "steps", "epochs", "batch_size", "learning_rate", "eval_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{option(name)} must be positive. Received: {value}.")
        if isinstance(self.rate, tuple):
            rates_of(self.rate, 0)
        for name in ("rate", "conv_rate", "output_rate", "final_sparsity"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, tuple) and not 0 <= value < 1:
                raise ValueError(
                    f"{option(name)} must be in [0, 1). Received: {value}.{share_meant(value)}"
                )
        if not all(1 <= number <= rounds for number in self.control_rounds):
            raise ValueError(
                f"--control-rounds counts from 1 to --rounds, {rounds}. "
                f"Received: {self.control_rounds}."
            )
        if self.control_rounds and not self.controls:
            raise ValueError("--control-rounds needs --controls, but there are none.")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("Give --steps or --epochs, not both.")
        if not self.seeds or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise ValueError(
                f"Give at least one seed, from 0 to 2**32 - 1. Received: {self.seeds}."
            )
        for name in ("seeds", "controls", "control_rounds"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                received = " ".join(map(str, values))
                raise ValueError(f"Give {option(name)} each value once. Received: {received}")

    def _rates_given(self) -> bool:
        single = self.rate is None or isinstance(self.rate, float)
        return self.conv_rate is not None or self.output_rate is not None or not single

    def _structure(self) -> structures.Structure | None:
        if self.structure is None:
            return None
        return resolved("structure", self.structure)

    def _amounts(
        self,
        recipe: Recipe,
        criterion: criteria.Criterion,
        structure: structures.Structure | None,
    ) -> dict[str, Any]:
        """Returns the scope and the rates with all choices made."""
        if structure is not None and structure.kept is not None:
            names = ("scope", "rate", "conv_rate", "output_rate", "final_sparsity")
            given = [option(name) for name in names if getattr(self, name) is not None]
            if given:
                raise ValueError(
                    f"--structure {self.structure} sets the sparsity and what is ranked together. "
                    f"Leave out {', '.join(given)}."
                )
            return {}
        whole = structure is not None and structure.whole_outputs
        per_layer = whole or (self.final_sparsity is None and self._rates_given())
        default = None if per_layer else recipe.scope
        if self.scope is not None and criterion.scope not in (None, self.scope):
            raise ValueError(
                f"--scope {self.scope}: {self.strategy} ranks weights only by scope "
                f"{criterion.scope}. Leave out --scope."
            )
        # The scope of a criterion may be one that is not an option.
        scope = selection.resolve_scope(criterion, self.scope or criterion.scope or default)
        if whole and scope == "global":
            raise ValueError(
                f"--structure {self.structure} with scope global may prune the outputs of the "
                "network, its classes. Use --scope layer, or --structure channels."
            )
        selection.Request.of(criterion, scope=scope, structure=structure)
        return {"scope": scope} | self._rates(recipe, scope, structure)

    def _rates(
        self, recipe: Recipe, scope: str, structure: structures.Structure | None
    ) -> dict[str, Any]:
        per_layer = {"conv_rate": self.conv_rate, "output_rate": self.output_rate}
        whole = structure is not None and (structure.coupled or structure.whole_outputs)
        if whole and self.output_rate:
            raise ValueError(
                f"--output-rate: with --structure {self.structure}, the outputs of the network, "
                "its classes, are never pruned."
            )
        if whole:
            del per_layer["output_rate"]
        none = {"output_rate": 0.0 if structure is not None and structure.whole_outputs else None}
        given = [option(name) for name, value in per_layer.items() if value is not None]
        convolutions = networks.has_convolutions(recipe.network)
        if self.conv_rate is not None and not convolutions:
            raise ValueError(f"--conv-rate: {recipe.network} has no convolutions.")
        is_own = networks.is_own(recipe.network)
        outputs = is_own and structure is not None and structure.whole_outputs
        if self.final_sparsity is not None:
            given += ["--rate"] if self.rate is not None else []
            if given:
                raise ValueError(f"Give --final-sparsity or {' and '.join(given)}, not both.")
            if outputs:
                raise self._outputs_pruned(recipe)
            return none
        if isinstance(self.rate, tuple):
            given += ["--rate with patterns"]
        if scope in _TOGETHER and given:
            raise ValueError(f"{' and '.join(given)}: scope {scope} ranks layers together.")
        if len(given) > 1 or (is_own and given == ["--output-rate"]):
            raise ValueError(
                f"{' and '.join(given)}: give rates of layers as patterns of --rate alone, as in "
                "--rate 0.2 conv=0.1 output=0.05."
            )
        if isinstance(self.rate, tuple):
            rates = rates_of(self.rate, recipe.rate)
            if outputs and 0 not in rates.values():
                raise self._outputs_pruned(recipe)
            first = str(rates.pop("default"))
            return {"rate": (first, *(f"{key}={rate}" for key, rate in rates.items()))} | (
                none if whole and not is_own else {}
            )
        rate = chosen(self.rate, recipe.rate)
        if outputs:
            raise self._outputs_pruned(recipe)
        if scope in _TOGETHER or is_own:
            return {"rate": rate}
        conv_rate = chosen(self.conv_rate, recipe.conv_share * rate) if convolutions else None
        return {
            "rate": rate,
            "conv_rate": conv_rate,
            "output_rate": chosen(self.output_rate, 0.5 * rate),
        } | (none if whole else {})

    def _outputs_pruned(self, recipe: Recipe) -> ValueError:
        rate = self.rate if isinstance(self.rate, float) else recipe.rate
        return ValueError(
            f"--structure {self.structure} with --network {recipe.network} may prune its outputs, "
            "the classes. Use --structure channels, or give the output layer a rate of 0: "
            f"--rate {rate} LAYER=0."
        )


def parse_steps(text: str, steps_per_epoch: int) -> int:
    """Parses a point in training: `0`, `500`, `500it` (steps), `2ep` (epochs).

    Raises:
        ValueError: If the text has none of these forms.
    """
    match = re.fullmatch(r"(\d+)(it|ep)?", text)
    if match is None:
        raise ValueError(f"--rewind-to expects a step such as 0, 500it or 2ep. Received: {text!r}.")
    number, unit = match.groups()
    return int(number) * (steps_per_epoch if unit == "ep" else 1)


def training_plan(config: Any, seed: int) -> TrainingPlan:
    """Returns the plan for training the network of a resolved configuration."""
    return taken(TrainingPlan, config, seed=seed, augment=networks.augmentation(config.network))


def choices(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a configuration that affect the results of a run."""
    others = ("out", "data_dir", "quiet", "overwrite", "log", *EXECUTION)
    return {k: v for k, v in values.items() if k not in others}


def chosen(*values: _T | None) -> _T:
    """Returns the first value that is not None, as none of a resolved configuration is."""
    return next(value for value in values if value is not None)
