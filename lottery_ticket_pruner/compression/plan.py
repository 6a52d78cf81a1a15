"""The plan of a search: its goals, methods and options."""

import dataclasses
import inspect
import math
from typing import Any

from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.checks import is_integer, is_number, share_meant
from lottery_ticket_pruner.tolerances import is_within

METHODS = ("auto", "iterative", "gradual", "one_shot", "channels")
SCOPES = ("global", "layer")
RETRAINING = ("learning_rate_rewinding", "weight_rewinding")
DEFAULT_DROP = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goals:
    """The goals of a search, as arguments of `prune`.

    Raises:
        ValueError: If a number is out of range.
    """

    max_drop: float | None = None
    sparsity: float | None = None
    size: int | None = None
    macs: float | None = None
    latency: float | Latency | None = None

    def __post_init__(self) -> None:
        if self.max_drop is not None and not (
            is_number(self.max_drop) and not math.isnan(self.max_drop)
        ):
            raise ValueError(f"`max_drop` must be a number or None. Received: {self.max_drop!r}")
        if self.sparsity is not None and not (is_number(self.sparsity) and 0 < self.sparsity < 1):
            raise ValueError(
                f"`sparsity` must be a number in (0, 1). Received: {self.sparsity!r}."
                f"{share_meant(self.sparsity)}"
            )
        if self.macs is not None and not (is_number(self.macs) and 0 < self.macs < 1):
            raise ValueError(
                "`macs` must be the share of the multiply-adds that is left, in (0, 1). "
                f"Received: {self.macs!r}.{share_meant(self.macs)}"
            )
        if self.size is not None and not (is_integer(self.size) and self.size > 0):
            raise ValueError(f"`size` must be a number of bytes. Received: {self.size!r}")
        if self.latency is not None:
            try:
                Latency.of(self.latency)
            except ValueError as error:
                raise ValueError(f"`latency`: {error}") from error

    @property
    def needs_channels(self) -> bool:
        """True if zeros inside a kernel meet none of it: the multiply-adds or the latency."""
        return self.macs is not None or self.latency is not None

    @property
    def tolerance(self) -> float | None:
        """The drop that is acceptable. If no goal is given, one hundredth."""
        if self == Goals():
            return DEFAULT_DROP
        return self.max_drop

    def accepts(self, drop: float, dense: float) -> bool:
        """Returns whether a drop from the dense model's value is acceptable. NaN is not."""
        return self.tolerance is None or is_within(drop, self.tolerance, dense)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Further options of `prune`.

    Attributes:
        mode: Direction of the metric: `"max"`, `"min"`, or `"auto"` for that of Keras' callbacks.
        rate: Share of the kept weights that a step prunes until the first that is not good enough.
        scope: `"global"` divides the sparsity among layers by layer-adaptive magnitude (LAMP),
            which leaves something of every layer; `"layer"` gives all the same. For channels, as
            in `update_masks`. None for `"global"`, and for channels `"layer"`.
        retraining: What is trained after each step: the weights as they are, with the learning rate
            from its start (`"learning_rate_rewinding"`), or, of a model that is not trained, the
            initial weights (`"weight_rewinding"`).
        batch_size: Number of examples per step of training.
        seed: Seed of the order of the examples.
        trained: Whether the model is trained. None to find out: its optimizer has done steps, or
            its biases have changed and its loss is below that of newly drawn models.
        on_row: Function that is called with each row as soon as it is known, and with the seconds
            since the beginning (`elapsed`), those that the rest will probably take (`remaining`)
            and the name of the `metric`.
        on_training: Function that is called before each training with the row of its model as far
            as it is known, and the number of steps.
        on_progress: Function that is called with the number of new steps of training.

    Raises:
        ValueError: If a value is out of range.
    """

    mode: str = "auto"
    rate: float = 0.5
    scope: str | None = None
    retraining: str = "learning_rate_rewinding"
    batch_size: int = 64
    seed: int = 0
    trained: bool | None = None
    on_row: Any = None
    on_training: Any = None
    on_progress: Any = None

    def __post_init__(self) -> None:
        if not (is_number(self.rate) and 0 < self.rate < 1):
            raise ValueError(
                f"`rate` must be a number in (0, 1). Received: {self.rate!r}."
                f"{share_meant(self.rate)}"
            )
        if self.scope not in (None, *SCOPES):
            raise ValueError(f"`scope` must be one of {SCOPES}. Received: {self.scope!r}")
        if self.retraining not in RETRAINING:
            raise ValueError(
                f"`retraining` must be one of {RETRAINING}. Received: {self.retraining!r}"
            )
        for name, least in (("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(f"`{name}` must be an integer from {least}. Received: {value!r}")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Options":
        """Creates options from keyword arguments.

        Raises:
            TypeError: If one has another name.
        """
        known = list(inspect.signature(cls).parameters)
        if unknown := sorted(options.keys() - set(known)):
            raise TypeError(
                f"`prune` has no option {', '.join(map(repr, unknown))}. Its further options are: "
                f"{', '.join(known)}."
            )
        return cls(**options)

    def arguments(self) -> dict[str, Any]:
        """Returns what determines the results, as JSON data."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if not name.startswith("on_")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The whole plan of a search.

    Attributes:
        goals: What is good and small enough.
        options: Further options.
        method: One of `METHODS`.
        metric: Name of the metric of the tolerance, or None.
        epochs: Epochs of training after each step, or None.
        minutes: Time to spend, or None.

    Raises:
        ValueError: If a value is out of range, or goals and method contradict each other.
    """

    goals: Goals
    options: Options
    method: str = "auto"
    metric: str | None = None
    epochs: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {METHODS}. Received: {self.method!r}")
        if self.epochs is not None and not (is_integer(self.epochs) and self.epochs >= 1):
            raise ValueError(f"`epochs` must be an integer from 1. Received: {self.epochs!r}")
        if self.minutes is not None and not (is_number(self.minutes) and self.minutes > 0):
            raise ValueError(f"`minutes` must be a positive number. Received: {self.minutes!r}")
        if self.goals.needs_channels and self.method not in ("auto", "channels"):
            name = "macs" if self.goals.latency is None else "latency"
            what = "save no multiply-adds" if name == "macs" else "do not make the model faster"
            raise ValueError(
                f"Zeros inside a kernel {what}: a goal of `{name}` needs "
                f'method="channels". Received: method={self.method!r}. For sparse kernels, prune '
                f'single weights by `LotteryTicketPruner.update_masks(budget={{"{name}": ...}})`.'
            )
        if self.method == "gradual" and self.options.retraining == "weight_rewinding":
            raise ValueError(
                'With method="gradual", weights are pruned while they train, and are not rewound: '
                'use retraining="learning_rate_rewinding".'
            )

    @property
    def stages(self) -> tuple[str, ...]:
        """The methods to try, the cheap one first."""
        if self.method != "auto":
            return (self.method,)
        if self.goals.needs_channels:
            return ("channels",)
        # Without a tolerance, nothing would say that pruning alone is not enough.
        if self.goals.tolerance is None:
            return ("iterative",)
        return ("magnitude", "sensitivity", "one_shot", "iterative")

    @property
    def cost(self) -> str:
        """Unit of the density of a step without other goals: `"weights"` or `"macs"`."""
        by_weights = self.stages != ("channels",) or self.goals.sparsity is not None
        return "weights" if by_weights else "macs"

    def arguments(self) -> dict[str, Any]:
        """Returns what determines the results, as JSON data. More time may be given later."""
        return {
            "goals": dataclasses.asdict(self.goals),
            "options": self.options.arguments(),
            "method": self.method,
            "metric": self.metric,
            "epochs": self.epochs,
        }
