"""One experiment as a typed configuration, which is also its command line and its folder's name."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from lottery_ticket_pruner import criteria, selection, treatments
from lottery_ticket_pruner.experiments import datasets, networks
from lottery_ticket_pruner.experiments.arguments import option
from lottery_ticket_pruner.experiments.options import (
    NO_HINT,
    OptionalFloat,
    OptionalInt,
    OptionalPath,
)
from lottery_ticket_pruner.fingerprints import names_with_code, of_json
from lottery_ticket_pruner.registry import UnknownNameError
from lottery_ticket_pruner.search_plans import (
    CONTROLS,
    RETRAINING,
    ControlPlan,
    PruningPlan,
    SearchPlan,
    kept_under,
    taken,
)
from lottery_ticket_pruner.training import TrainingPlan


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The settings of a run for the choices that its configuration leaves open."""

    network: str
    learning_rate: float
    steps: int
    rounds: int
    rate: float = 0.2
    conv_share: float = 0.5
    batch_size: int = 60
    optimizer: str = "adam"
    scope: str | None = None


# Frankle & Carbin, arXiv 1803.03635, figure 2. Convolutions lose `conv_share` of `rate`, the
# output layer half of it.
_RECIPES = {
    "lenet-300-100": Recipe("lenet-300-100", 1.2e-3, 50_000, 20),
    "conv-2": Recipe("conv-2", 2e-4, 20_000, 20),
    "conv-4": Recipe("conv-4", 3e-4, 25_000, 20),
    "conv-6": Recipe("conv-6", 3e-4, 30_000, 20, conv_share=0.75),
    # Frankle et al., arXiv 1912.05671, table 2: all layers compete.
    "resnet-20": Recipe(
        "resnet-20", 0.1, 72_000, 20, batch_size=128, optimizer="sgd", scope="global"
    ),
}
# The recipe of `lottery-ticket run` without arguments: down to 2 % in nine large rounds, and
# quick enough for three seeds in less than a minute.
_DIGITS = Recipe("lenet-300-100", 2e-3, 600, 9, rate=0.36)

_DATA = tyro.conf.arg(
    metavar="NAME",
    help=f"Data set: {', '.join(datasets.NAMES)}; all but digits are read from --data-dir or "
    "downloaded. Or your own: module:function or path/to/file.py:function, which returns "
    "((x_train, y_train), (x_test, y_test)) or two tf.data.Datasets of batches.",
)
_STRATEGY = tyro.conf.arg(
    metavar="NAME",
    help=f"Pruning criterion, which decides what stays: {', '.join(criteria.names())}.",
)
_KEPT = tyro.conf.arg(
    metavar="NAME",
    help="What the ticket's kept weights start from in every round: "
    f"{', '.join(treatments.kept_names())}.",
)
_PRUNED = tyro.conf.arg(
    metavar="NAME",
    help=f"What its pruned weights are: {', '.join(treatments.pruned_names())}.",
)


class Experiment:
    """What the configurations of all experiments have in common, which are dataclasses."""

    data: str
    network: str | None
    out: Path | None

    @property
    def subject(self) -> str:
        """What a resolved configuration is about, for its name."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """The name of a resolved configuration: readable, and different for different runs."""
        digest = of_json(choices(self.to_dict()))[:8]
        return f"{datasets.label(self.data)}-{self.network}-{self.subject}-{digest}"

    @property
    def folder(self) -> Path:
        """The folder that a resolved configuration writes to."""
        return self.out or Path("runs") / self.name

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration in JSON's types."""
        values = dataclasses.asdict(self)
        del values["overwrite"]  # Of one call, not of the run.
        return json.loads(json.dumps(values, default=str))


@dataclasses.dataclass(frozen=True)
class RunConfig(Experiment):
    """Find lottery tickets: train, prune, rewind, repeat, next to controls at the same sparsity.

    Without any option: scikit-learn's handwritten digits, a fully connected 300-100 network, nine
    rounds of pruning down to 2 % of the weights, three seeds; under a minute on two cores. Options
    left out take the values of Frankle & Carbin's recipe for the network.
    """

    data: Annotated[str, _DATA] = "digits"
    data_dir: OptionalPath = None
    """Folder with the data set's published files or its .npz, or with a subfolder of them."""
    network: Annotated[Literal[*networks.NAMES] | None, NO_HINT] = None
    """Network; by default lenet-300-100, for CIFAR-10 conv-2."""
    strategy: Annotated[str, _STRATEGY] = "large_final"
    scope: Annotated[Literal["layer", "global"] | None, NO_HINT] = None
    """Which weights compete: those of a layer or all; by default the strategy's choice, then the \
recipe's: all for resnet-20, else a layer's."""
    rounds: OptionalInt = None
    """Rounds of pruning after the dense run; by default 20, for digits 9."""
    rate: OptionalFloat = None
    """Share of the remaining weights dropped per round; by default 0.2, for digits 0.36."""
    conv_rate: OptionalFloat = None
    """The same for convolutions, where there are some; by default half of --rate, for conv-6 \
three quarters."""
    output_rate: OptionalFloat = None
    """The same for the output layer; by default half of --rate."""
    final_sparsity: OptionalFloat = None
    """Instead of rates: share of pruned weights after the last round, reached at one rate."""
    rewind_to: str = "0"
    """Training step to rewind to: 0, or as in 500it (steps) or 2ep (epochs)."""
    retraining: Literal[*RETRAINING] = "weight_rewinding"
    """What the ticket trains from: rewound weights, its trained ones with the learning rates of \
the rewinding point, or its trained ones at the last learning rate."""
    kept: Annotated[str, _KEPT] = "rewind"
    pruned: Annotated[str, _PRUNED] = "zero"
    controls: tuple[Literal[*CONTROLS], ...] = ("random_reinit", "random_mask")
    """Arms next to the ticket, each trained once from the rewinding point, however long the \
ticket has been under another --retraining; name none to train the ticket alone."""
    control_rounds: tuple[int, ...] = ()
    """Rounds to train the controls in; by default all."""
    steps: OptionalInt = None
    """Training steps of each run; by default those of the network's recipe (50,000 for \
lenet-300-100, whatever the data), for digits 600."""
    epochs: OptionalInt = None
    """Instead of --steps: epochs of each run."""
    batch_size: OptionalInt = None
    """Examples per step; by default 60, for resnet-20 128."""
    optimizer: Annotated[Literal[*networks.OPTIMIZERS] | None, NO_HINT] = None
    """Adam, or SGD with momentum and a tenth of the rate after half and three quarters of the \
steps; by default that of the network's recipe: sgd for resnet-20, else adam."""
    learning_rate: OptionalFloat = None
    """Learning rate; by default that of the network's recipe (0.0012 for lenet-300-100)."""
    eval_every: OptionalInt = None
    """Steps between looks at the validation images; by default a tenth of all, at most 500."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One replicate for each seed, from the initial weights on."""
    out: OptionalPath = None
    """Run folder; by default one in ./runs, named after the options. A run of the same options \
that was interrupted goes on; a finished one, and one of other options, stay as they are."""
    overwrite: bool = False
    """Replace the run that is in the run folder, when this one is finished."""
    deterministic: bool = False
    """Repeat bit for bit on as many cores of this machine: deterministic operations, nothing \
decided by timing."""
    quiet: bool = False
    """Print nothing."""

    def resolve(self, training_images: int) -> "RunConfig":
        """The same configuration with every choice made.

        Args:
            training_images: how many there are, to count epochs in steps.

        Raises:
            ValueError: contradicting options, unknown names, numbers out of their range.
        """
        recipe = self._recipe()
        criterion = _resolved("strategy", criteria.get, self.strategy)
        _resolved("kept", functools.partial(kept_under, self.retraining), self.kept)
        _resolved("pruned", treatments.get_pruned, self.pruned)
        rounds = _chosen(self.rounds, recipe.rounds)
        self._check_numbers(rounds)
        batch_size = _chosen(self.batch_size, recipe.batch_size)
        steps_per_epoch = -(-training_images // batch_size)
        epochs = None if self.epochs is None else self.epochs * steps_per_epoch
        steps = _chosen(self.steps, epochs, recipe.steps)
        default = None if self.final_sparsity is None and self._rates_given() else recipe.scope
        scope = selection.resolve_scope(criterion, self.scope or criterion.scope or default)
        rewind_to = parse_steps(self.rewind_to, steps_per_epoch)
        if rewind_to >= steps:
            raise ValueError(f"--rewind-to {self.rewind_to} is not before the end, step {steps}.")
        return dataclasses.replace(
            self,
            network=recipe.network,
            scope=scope,
            rounds=rounds,
            steps=steps,
            epochs=None,
            batch_size=batch_size,
            optimizer=_chosen(self.optimizer, recipe.optimizer),
            learning_rate=_chosen(self.learning_rate, recipe.learning_rate),
            eval_every=_chosen(self.eval_every, min(500, max(1, steps // 10))),
            rewind_to=f"{rewind_to}it",
            **self._rates(recipe, scope),
        )

    @property
    def subject(self) -> str:
        """The criterion."""
        return self.strategy

    @property
    def amount(self) -> dict[str, Any]:
        """A resolved configuration's `rate` or `sparsity`, as `find_ticket` takes it."""
        if self.final_sparsity is not None:
            return {"sparsity": self.final_sparsity}
        if self.scope == "global":
            return {"rate": self.rate}
        rates = {"^output/": self.output_rate, "default": self.rate}
        if networks.has_convolutions(self.network):
            rates["^conv_"] = self.conv_rate
        return {"rate": rates}

    def search_plan(self, replicate: int) -> SearchPlan:
        """Returns how a resolved configuration finds the ticket of a replicate."""
        rewind_to = parse_steps(self.rewind_to, 1)
        return SearchPlan(
            training=training_plan(self, self.seeds[replicate]),
            pruning=taken(PruningPlan, self, rewind_to=rewind_to, **self.amount),
            control=taken(ControlPlan, self, control_rounds=self.control_rounds or None),
            replicate=replicate,
        )

    def _recipe(self) -> Recipe:
        own = datasets.is_own(self.data)
        if self.data not in datasets.NAMES and not own:
            raise UnknownNameError("data set", self.data, datasets.NAMES)
        if self.data == "digits" and self.network in (None, _DIGITS.network):
            return _DIGITS
        cifar = "cifar10" in self.data and not own
        network = self.network or ("conv-2" if cifar else "lenet-300-100")
        if network not in _RECIPES:
            raise UnknownNameError("network", network, networks.NAMES)
        return _RECIPES[network]

    def _check_numbers(self, rounds: int) -> None:
        for name in ("rounds", "steps", "epochs", "batch_size", "learning_rate", "eval_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{option(name)} must be positive. Received: {value}.")
        for name in ("rate", "conv_rate", "output_rate", "final_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"{option(name)} must be in [0, 1). Received: {value}.")
        if not all(1 <= number <= rounds for number in self.control_rounds):
            raise ValueError(
                f"--control-rounds counts from 1 to --rounds, {rounds}. "
                f"Received: {self.control_rounds}."
            )
        if self.control_rounds and not self.controls:
            raise ValueError("--control-rounds needs --controls, and there are none.")
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
        return self.conv_rate is not None or self.output_rate is not None

    def _rates(self, recipe: Recipe, scope: str) -> dict[str, float | None]:
        per_layer = {"conv_rate": self.conv_rate, "output_rate": self.output_rate}
        given = [option(name) for name, value in per_layer.items() if value is not None]
        convolutions = networks.has_convolutions(recipe.network)
        if self.conv_rate is not None and not convolutions:
            raise ValueError(f"--conv-rate: {recipe.network} has no convolutions.")
        if self.final_sparsity is not None:
            given += ["--rate"] if self.rate is not None else []
            if given:
                raise ValueError(f"Give --final-sparsity or {' and '.join(given)}, not both.")
            return {}
        rate = _chosen(self.rate, recipe.rate)
        if scope == "global":
            if given:
                raise ValueError(f"{' and '.join(given)}: all layers compete under scope global.")
            return {"rate": rate}
        conv_rate = _chosen(self.conv_rate, recipe.conv_share * rate) if convolutions else None
        return {
            "rate": rate,
            "conv_rate": conv_rate,
            "output_rate": _chosen(self.output_rate, 0.5 * rate),
        }


def parse_steps(text: str, steps_per_epoch: int) -> int:
    """Read a point in training: `0`, `500`, `500it` (steps), `2ep` (epochs).

    Raises:
        ValueError: the text is none of these.
    """
    match = re.fullmatch(r"(\d+)(it|ep)?", text)
    if match is None:
        raise ValueError(f"Expected a step such as 0, 500it or 2ep. Received: {text!r}.")
    number, unit = match.groups()
    return int(number) * (steps_per_epoch if unit == "ep" else 1)


def training_plan(config: Any, seed: int) -> TrainingPlan:
    """Returns how a resolved configuration of any experiment trains its network."""
    return taken(TrainingPlan, config, seed=seed, augment=networks.augmentation(config.network))


def choices(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a configuration that affect the results of a run."""
    return {k: v for k, v in values.items() if k not in ("out", "data_dir", "quiet", "overwrite")}


def code_of(values: Mapping[str, Any]) -> str:
    """Returns the custom criteria and treatments of a configuration, by their code.

    Raises:
        UnidentifiedError: one has no identity.
    """
    getters = {
        "strategy": criteria.get,
        "kept": treatments.get_kept,
        "pruned": treatments.get_pruned,
    }
    made = [get(values[name]) for name, get in getters.items() if name in values]
    return names_with_code(made + [criteria.get(name) for name in values.get("criteria", ())])


def _chosen(*values: Any) -> Any:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def _resolved(field: str, get: Callable[[Any], Any], name: Any) -> Any:
    """Returns what a name stands for; the error for an unknown one names the option."""
    try:
        return get(name)
    except UnknownNameError as error:
        raise ValueError(
            f"{option(field)}: {error.without_remedy} One of your own has to be registered by "
            "then, as in the module that --data names."
        ) from error
