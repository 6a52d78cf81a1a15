"""Options of the experiments, and of sweeps over them."""

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from _lottery_ticket import names
from _lottery_ticket.types import NO_HINT, Devices, OptionalFloat, OptionalInt, OptionalPath, choice

if TYPE_CHECKING:
    # Type checkers cannot see which names there are.
    _Optimizer: TypeAlias = str
    _Retraining: TypeAlias = str
    _Control: TypeAlias = str
    _Weights: TypeAlias = str
    _Name: TypeAlias = str
else:
    _Optimizer = Literal[*names.OPTIMIZERS]
    _Retraining = Literal[*names.RETRAINING]
    _Control = Literal[*names.CONTROLS]
    _Weights = Literal[*names.WEIGHTS]
    _Name = Literal[*names.EXECUTORS]

_CUSTOM = "For a custom one: module:name or path/to/file.py:name"
_DATA = tyro.conf.arg(
    metavar="NAME",
    help=f"Data set: {', '.join(names.DATASETS)}. Of these, {', '.join(names.DOWNLOADED)} are "
    "read from --data-dir or downloaded. For custom data: module:function or "
    "path/to/file.py:function, which returns ((x_train, y_train), (x_test, y_test)), three such "
    "pairs, the second one for validation, (x, y), of which a fifth is the test data, or as many "
    "tf.data.Datasets of batches.",
)
_NETWORK = tyro.conf.arg(
    metavar="NAME",
    help_behavior_hint="",
    help=f"Network: {', '.join(names.NETWORKS)}. Default: lenet-300-100, or conv-2 for CIFAR-10. "
    f"{_CUSTOM}, a function that returns a Keras model; or a .keras file, whose architecture gets "
    "new initial weights for each seed. A compiled model keeps its loss and optimizer, others are "
    "trained with --optimizer (adam) and cross-entropy. All layers have the same rate.",
)
_STRATEGY = tyro.conf.arg(
    metavar="NAME",
    help=f"Pruning criterion, which decides what is kept: {', '.join(names.CRITERIA)}; "
    f"with --structure channels also {', '.join(names.CHANNEL_CRITERIA)}. In Python, "
    f"help(lottery_ticket_pruner.criteria) explains them. {_CUSTOM}.",
)
_SCOPE = choice(
    *("layer", "global", "isomorphic"),
    help="Weights that are ranked together. With layer, every layer loses its rate. With global, "
    "the weights with the lowest scores of the whole model are pruned, wherever they are. With "
    "isomorphic (only with --structure channels), layers of equal shapes share a ranking. Default: "
    f"global for resnet-20 and for {', '.join(names.GLOBAL[:-1])} and {names.GLOBAL[-1]}, each "
    "output for wanda, otherwise layer.",
)
_STRUCTURE = tyro.conf.arg(
    metavar="NAME",
    help_behavior_hint="",
    help="Weights that are pruned together: filters or units (the same), channels (with all "
    "weights tied to them, so that `masked_layers.shrink` can remove them), blocks such as 4x1, "
    f"N:M such as 2:4. Rates are shares of these. Default: single weights. {_CUSTOM}.",
)
_RATE = tyro.conf.arg(
    metavar="FLOAT [PATTERN=FLOAT ...]",
    help_behavior_hint="",
    help="Share of the remaining weights pruned per round. Default: 0.2, or 0.36 for small data "
    "sets. Layers can have their own: --rate 0.2 conv=0.1 output=0.05 gives 0.1 to all whose path, "
    "such as conv_1/kernel, matches the regular expression conv.",
)
_KEPT = tyro.conf.arg(
    metavar="NAME",
    help="Values that the ticket's kept weights start from in every round: "
    f"{', '.join(names.KEPT)}. rewind takes those of --rewind-to, finetune the trained ones; "
    "reinit draws new ones, reshuffle permutes the kept ones of a layer, and constant gives all of "
    "a layer the same magnitude (the standard deviation of its initial weights) and random signs. "
    f"..._same_sign keeps the initial signs. {_CUSTOM}.",
)
_PRUNED = tyro.conf.arg(
    metavar="NAME",
    help=f"Values of its pruned weights: {', '.join(names.PRUNED)}. freeze keeps them at their "
    "initial values, zero_if_shrunk only those whose magnitude did not shrink in training; "
    f"zero_if_shrunk_all also sets kept weights to zero that shrank. {_CUSTOM}.",
)
_CHOSEN = tyro.conf.arg(
    metavar="NAME",
    help_behavior_hint="",
    help="Criteria that compute the masks (without --learn), of those that rank only recorded "
    f"weights: {', '.join(names.RECORDED)}. Default: all of these. {_CUSTOM}.",
)
_Over = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="OPTION=VALUE,VALUE", help_behavior_hint="(repeatable)"),
]
_Executor = Annotated[_Name | None, choice(*names.EXECUTORS)]
_Address = Annotated[str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="")]
_Repeated = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(metavar="NAME=VALUE", help_behavior_hint="(repeatable)"),
]
# All criteria when the option was added. The default is part of a folder's name and of the
# configurations on disk, so criteria that are added do not change it.
CRITERIA = names.RECORDED[:13]
SAMPLES = 10


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Find lottery tickets: train, prune, rewind, repeat, with controls at the same sparsity.

    Without options: handwritten digits of scikit-learn, a fully connected 300-100 network, nine
    rounds of pruning down to 2 % of the weights, three seeds; under a minute on two cores. Other
    defaults are the values of Frankle & Carbin's recipe for the network.
    """

    data: Annotated[str, _DATA] = "digits"
    data_dir: OptionalPath = None
    """Folder with the published files of the data set or its .npz, or with a subfolder of them."""
    network: Annotated[str | None, _NETWORK] = None
    strategy: Annotated[str, _STRATEGY] = "large_final"
    scope: Annotated[Literal["layer", "global", "isomorphic"] | None, _SCOPE] = None
    structure: Annotated[str | None, _STRUCTURE] = None
    rounds: OptionalInt = None
    """Rounds of pruning after the dense run. Default: 20, or 9 for small data sets (digits)."""
    rate: Annotated[float | tuple[str, ...] | None, _RATE] = None
    conv_rate: OptionalFloat = None
    """The same for convolutions, if there are any. Default: half of --rate, or three quarters \
for conv-6."""
    output_rate: OptionalFloat = None
    """The same for the output layer. Default: half of --rate."""
    final_sparsity: OptionalFloat = None
    """Share of pruned weights after the last round, reached at one rate. Replaces the rates."""
    rewind_to: str = "0"
    """Training step to rewind to: 0, or as in 500it (steps) or 2ep (epochs)."""
    retraining: _Retraining = "weight_rewinding"
    """What the ticket is trained from: rewound weights, trained weights with the learning rates \
of the rewinding point, or trained weights at the last learning rate."""
    kept: Annotated[str, _KEPT] = "rewind"
    pruned: Annotated[str, _PRUNED] = "zero"
    controls: tuple[_Control, ...] = ("random_reinit", "random_mask")
    """Controls for the ticket, each trained once from the rewinding point, even if another \
--retraining trains the ticket for longer. Pass no names to train only the ticket."""
    control_rounds: Annotated[tuple[int, ...], NO_HINT] = ()
    """Rounds in which controls are trained. Default: all."""
    steps: OptionalInt = None
    """Training steps of each run. Default: those of the network's recipe (50,000 for \
lenet-300-100 on other data), or 600 for small data sets."""
    epochs: OptionalInt = None
    """Epochs of each run, instead of --steps."""
    batch_size: OptionalInt = None
    """Examples per step. Default: 60, or 128 for resnet-20."""
    optimizer: Annotated[_Optimizer | None, choice(*names.OPTIMIZERS)] = None
    """Adam, or SGD with momentum and a learning rate divided by ten after half and three quarters \
of the steps. Default: that of the network's recipe, sgd for resnet-20 and otherwise adam."""
    learning_rate: OptionalFloat = None
    """Learning rate. Default: that of the network's recipe (0.0012 for lenet-300-100)."""
    eval_every: OptionalInt = None
    """Steps between evaluations on the validation data. Default: a tenth of all, at most 500."""
    log: Literal["tensorboard", "mlflow", "wandb"] = "tensorboard"
    """Tool that logs the curves: TensorBoard, in the run folder, or MLflow or Weights & Biases, \
where their environment variables say. They have a run for each seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. All is repeated for each, with other initial weights and another order of the data."""
    out: OptionalPath = None
    """Run folder. Default: a folder in ./runs, named after the options. An interrupted run with \
the same options is resumed; finished runs, and runs with other options, are not changed."""
    overwrite: bool = False
    """Replace the run in the run folder once this one is finished."""
    deterministic: bool = False
    """Reproduce results bit for bit on this machine with the same number of cores: deterministic \
operations, and no decisions based on timing."""
    executor: _Executor = None
    """What executes the seeds, each as a job: processes of this machine (local), or a cluster \
(extras ray, slurm and dask). Default: this process, one seed after the other."""
    address: _Address = None
    """Address of a cluster of Ray or dask. Default: the one that RAY_ADDRESS or \
DASK_SCHEDULER_ADDRESS names, or else one that is started on this machine."""
    executor_option: _Repeated = ()
    """What a job asks of a cluster: an option of `ray.remote` (num_gpus=1), of submitit \
(slurm_partition=gpu), or a resource of dask's workers (GPU=1)."""
    jobs: OptionalInt = None
    """With --executor: number of seeds at a time. Default: one per core, or as many as the \
cluster has room for."""
    devices: Devices = ()
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class SupermaskOptions:
    """Evaluate masks over untrained weights, or learn them.

    Without --learn, a network is trained, each criterion computes masks of many sparsities from its
    initial and trained weights, and the masks are evaluated over the initial weights. With --learn,
    the masks themselves are trained over fixed initial weights, which are Glorot-normal, or
    He-normal for resnet-20. For edge_popup masks, Ramanujan et al. (arXiv 1911.13299) use He-normal
    weights (Kaiming-normal) for every network, and derive the signed constant from these.
    """

    learn: Annotated[
        Literal["bernoulli", "edge_popup"] | None, choice("bernoulli", "edge_popup")
    ] = None
    """Learn masks: sampled from probabilities, or with the weights of the best scores."""
    data: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits"
    """Data set by name, or custom data as module:function: see `lottery-ticket run --help`."""
    data_dir: OptionalPath = None
    """Folder with the published files of the data set or its .npz, or with a subfolder of them."""
    network: Annotated[str | None, _NETWORK] = None
    criteria: Annotated[tuple[str, ...], _CHOSEN] = CRITERIA
    sparsities: Annotated[tuple[float, ...], NO_HINT] = ()
    """Shares of pruned weights. Default: eleven from 0.1 to 0.98, or 0.5 to learn edge_popup \
masks. A bernoulli mask learns its sparsity."""
    weights: tuple[_Weights, ...] = names.WEIGHTS
    """Values under the masks: initial weights, or (signed_constant) the signs of these times the \
standard deviation of their layer."""
    dwr: tuple[bool, ...] = (False, True)
    """Whether the kept weights of each layer are multiplied by the number of all divided by the \
number of kept ones (dynamic weight rescaling). Several values are tried in turn."""
    scope: Annotated[Literal["layer", "global"] | None, choice("layer", "global")] = None
    """Weights that are ranked together. With layer, every layer has the sparsity. With global, \
the weights with the lowest scores of the whole model are pruned, wherever they are. Default: \
layer, or global for resnet-20."""
    steps: OptionalInt = None
    """Training steps. Default: those of the network's recipe, or 20,000 to learn masks."""
    epochs: OptionalInt = None
    """Epochs, instead of --steps."""
    batch_size: OptionalInt = None
    """Examples per step. Default: 60, 128 for resnet-20, or 250 to learn masks."""
    learning_rate: OptionalFloat = None
    """Learning rate of the trained network. Default: that of its recipe. Masks are learned with \
the optimizers of their papers."""
    samples: int = SAMPLES
    """Number of masks sampled to evaluate a learned bernoulli mask (with --learn)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. All is repeated for each, with other initial weights and another order of the data."""
    out: OptionalPath = None
    """Run folder. Default: a folder in ./runs, named after the options. Complete seeds of an \
interrupted run with the same options are kept; finished runs, and runs with other options, are \
not changed."""
    overwrite: bool = False
    """Replace the run in the run folder once this one is finished."""
    deterministic: bool = False
    """Reproduce results bit for bit on this machine with the same number of cores."""
    devices: Devices = ()
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class InstabilityOptions:
    """Train two copies from the same weights with different data orders, and compare them.

    A network is trained to each of several points, and from there to the end twice. The largest
    test error on the straight line between the two ends, minus the mean error of the ends, is the
    instability of this point. Below 2 points, the network counts as stable (Frankle et al.,
    arXiv 1912.05671). With --masks, this is measured for a ticket.
    """

    data: Annotated[str, tyro.conf.arg(metavar="NAME")] = "digits"
    """Data set by name, or custom data as module:function: see `lottery-ticket run --help`."""
    data_dir: OptionalPath = None
    """Folder with the published files of the data set or its .npz, or with a subfolder of them."""
    network: Annotated[str | None, _NETWORK] = None
    rewind_to: Annotated[tuple[str, ...], NO_HINT] = ()
    """Points to train to: 0, or as in 500it (steps) or 2ep (epochs). Default: 0, 1, 2, 5, 10, \
20 and 50 % of the steps, or with --masks the rewinding point of that run."""
    masks: OptionalPath = None
    """Folder of a finished run, whose masks both trainings use, for each seed its own."""
    round: OptionalInt = None
    """Round of that run whose masks are used. Default: the last."""
    steps: OptionalInt = None
    """Steps of the whole training. Default: those of the network's recipe, 600 for small \
data sets, or with --masks those of that run."""
    epochs: OptionalInt = None
    """Epochs of the whole training, instead of --steps."""
    batch_size: OptionalInt = None
    """Examples per step. Default: 60, or 128 for resnet-20."""
    optimizer: Annotated[_Optimizer | None, choice(*names.OPTIMIZERS)] = None
    """Optimizer. Default: that of the network's recipe."""
    learning_rate: OptionalFloat = None
    """Learning rate. Default: that of the network's recipe."""
    points: int = 30
    """Number of points on the line, including its ends."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds. All is repeated for each, with other initial weights and another order of the data."""
    out: OptionalPath = None
    """Run folder. Default: a folder in ./runs, named after the options. Results of an interrupted \
run with the same options are kept; finished runs, and runs with other options, are not changed."""
    overwrite: bool = False
    """Replace the run in the run folder once this one is finished."""
    deterministic: bool = False
    """Reproduce results bit for bit on this machine with the same number of cores."""
    devices: Devices = ()
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class _Sweeping:
    over: _Over = ()
    """Name of an option, and the values to try."""
    jobs: OptionalInt = None
    """Number of runs at a time, on this machine each on its share of the cores. Default: one per \
core, or as many as the cluster has room for."""
    executor: _Executor = "local"
    """What executes the runs: processes of this machine, or a cluster (extras ray, slurm and \
dask)."""
    address: _Address = None
    """Address of a cluster of Ray or dask. Default: the one that RAY_ADDRESS or \
DASK_SCHEDULER_ADDRESS names, or else one that is started on this machine."""
    executor_option: _Repeated = ()
    """What a job asks of a cluster: an option of `ray.remote` (num_gpus=1), of submitit \
(slurm_partition=gpu), or a resource of dask's workers (GPU=1)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each of which has a separate run for each combination."""
    out: OptionalPath = None
    """Folder for all run folders and results.csv. By default a folder in ./runs. Runs that are \
already finished there are kept, and missing ones are run."""
    overwrite: bool = False
    """Replace the sweep in that folder once all runs of this one are finished."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class SweepOptions(_Sweeping, RunOptions):
    """Run every combination of some options and seeds, several at a time.

    Accepts every option of `lottery-ticket run`. --over rate=0.2,0.4 tries several values of an
    option. With --over strategy=large_final,random next to it, all four combinations are run, each
    with each seed. If an option takes several values, join them with plus signs, as in
    --over controls=none,random_mask+random_reinit. Repeat the command to resume an interrupted
    sweep.

    With --search optuna --trials 20, Optuna chooses twenty combinations, one after the other, by
    the validation loss of their last tickets and by the weights that these keep. The test data has
    no part in the choice.
    """

    search: Literal["grid", "optuna"] = "grid"
    """Combinations to run: all of them, or those that Optuna chooses (extra optuna)."""
    trials: OptionalInt = None
    """Number of combinations that Optuna tries, in all calls together. Default: 20."""


@dataclasses.dataclass(frozen=True)
class SupermaskSweepOptions(_Sweeping, SupermaskOptions):
    """Compute or learn supermasks for every combination of some options and seeds.

    Accepts every option of `lottery-ticket supermask`, and --over as in `lottery-ticket sweep`.
    For example, --over learn=bernoulli,edge_popup --over weights=initial,signed_constant learns
    four kinds of masks, each with each seed, several at a time. Repeat the command to resume an
    interrupted sweep.
    """
