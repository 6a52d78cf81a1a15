"""Options of the commands that work on models and folders."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from _lottery_ticket import names
from _lottery_ticket.types import NO_HINT, Devices, OptionalFloat, OptionalInt, OptionalPath, choice

_MODEL = tyro.conf.arg(
    metavar="[MODEL]",
    help_behavior_hint="",
    help="A .keras or .h5 file of a compiled model, module:function or path/to/file.py:function, "
    f"which returns one, or a network to train first: {', '.join(names.NETWORKS)}. Default: the "
    "network of the data set.",
)
_DATA = tyro.conf.arg(
    metavar="NAME",
    help=f"Data set: {', '.join(names.DATASETS)}. Or module:function or path/to/file.py:function, "
    "which returns (x, y), two pairs for training and test, three for training, validation and "
    "test, or data sets of batches. They are used as they are, so scale them like the inputs of "
    "the model.",
)
_MODELS = tyro.conf.arg(
    metavar="MODEL [MODEL ...]",
    help_behavior_hint="",
    help="Models, the first of which the others are compared with: .keras or .h5 files, tickets "
    "(.safetensors), SavedModel folders such as served/1, folders of `prune` or `run` (the ticket "
    "of its first seed), or module:function and file.py:function, which return a model.",
)
_TEST_DATA = tyro.conf.arg(
    metavar="NAME",
    help=f"Data set: {', '.join(names.DATASETS)}, of which the test examples are used. Or "
    "module:function or path/to/file.py:function, which returns (x, y), or two or three pairs, of "
    "which the last one is used. They are used as they are, unless a folder of `prune` or `run` "
    "has this data: then its test examples are used as there. Default: those of the first folder.",
    help_behavior_hint="",
)
_Folders = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint=""),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """Find the smallest version of a model that is good enough, and export it for serving.

    Without arguments: handwritten digits of scikit-learn and a fully connected 300-100 network, to
    at most one point of accuracy less; under a minute on two cores.

    The folder contains model.keras, served/1 (a sparse SavedModel), results.csv, report.html,
    model_card.md and config.json. An interrupted search is resumed by the same command. `repeat`
    runs it again in another folder, and `report` writes its report again.
    """

    model: Annotated[str | None, tyro.conf.Positional, _MODEL] = None
    data: Annotated[str, _DATA] = "digits"
    data_dir: OptionalPath = None
    """Folder with the published files of the data set, or with a subfolder of them."""
    max_drop: OptionalFloat = None
    """How much worse the metric may become on validation data: 0.01 is one point of accuracy. \
Default: 0.01 of a metric that should be high, or no condition if another goal is given."""
    sparsity: OptionalFloat = None
    """Share of weights to prune."""
    size: Annotated[str | None, tyro.conf.arg(metavar="BYTES", help_behavior_hint="")] = None
    """Size of the folder for serving, such as 500kB or 2MB."""
    macs: OptionalFloat = None
    """Share of the multiply-adds that may be left. Prunes channels; in Python, update_masks has \
such a budget for single weights."""
    latency: Annotated[str | None, tyro.conf.arg(metavar="TIME", help_behavior_hint="")] = None
    """Milliseconds of a call with one example on this machine, such as 3ms, or a share of that of \
the dense model, such as 0.5. Prunes channels; in Python, update_masks has such a budget for \
single weights."""
    method: Literal["auto", "iterative", "gradual", "one_shot", "channels"] = "auto"
    """one_shot fits the kept weights without training, iterative trains after each step, gradual \
prunes while it trains, channels removes whole filters and units. auto continues iteratively where \
methods without training end, or prunes channels for --macs and --latency."""
    metric: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """Metric of --max-drop, as in the results of evaluate. Default: accuracy, or the loss."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Direction of the metric. auto: the one that Keras' callbacks choose."""
    epochs: OptionalInt = None
    """Epochs of training after each step, at most. Default: 3, or as many as 400 steps take."""
    batch_size: int = 64
    """Examples per step of training."""
    devices: Devices = ()
    rate: float = 0.5
    """Share of the kept weights that a step prunes, until the first that is not good enough."""
    scope: Annotated[Literal["global", "layer"] | None, choice("global", "layer")] = None
    """global divides the sparsity among layers by magnitude relative to each layer, layer gives \
all the same. Default: global, or layer for channels."""
    retraining: Literal["learning_rate_rewinding", "weight_rewinding"] = "learning_rate_rewinding"
    """What is trained after a step: the weights as they are, or, of an untrained model, the \
initial ones."""
    minutes: OptionalFloat = None
    """Time to spend, from loading the model and data to the report. The search ends before a step \
that would probably exceed it, and goes on to finer steps than without this option."""
    log: Annotated[
        Literal["tensorboard", "mlflow", "wandb"] | None, choice("tensorboard", "mlflow", "wandb")
    ] = None
    """Tool that logs the models that are tried: TensorBoard, in logs/ of the folder, or MLflow or \
Weights & Biases, where their environment variables say. Default: none."""
    seed: int = 0
    """Seed of the order of the examples, and of the weights of a network to train first."""
    out: OptionalPath = None
    """Folder to write. Default: a folder in ./runs, named after the options."""
    overwrite: bool = False
    """Discard the state of an earlier search in the folder, and replace its results."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Compare models on test data: metric, predictions, sparsity, size and latency.

    The difference of the metric from that of the first model has a 95 % interval. Agreement is the
    share of examples for which a model predicts the same class as the first one. Bytes are those of
    a sparse SavedModel. Latency is that of one call, measured in turns: of a SavedModel as
    TensorFlow runs it, of other models as Keras does.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], _MODELS]
    data: Annotated[str | None, _TEST_DATA] = None
    data_dir: OptionalPath = None
    """Folder with the published files of the data set, or with a subfolder of them."""
    batch_size: int = 1
    """Examples of a call whose time is measured."""
    page: OptionalPath = None
    """File for a web page with the comparison, such as comparison.html."""
    json: bool = False
    """Print the result as a JSON document, and nothing else, on standard output."""


@dataclasses.dataclass(frozen=True)
class RepeatOptions:
    """Re-run the experiment of a run folder with the same options.

    Options that were added after the folder was written have their defaults.

    Works on the folders of all experiments, and on single runs inside the folder of a sweep. If the
    original was run with --deterministic, the repetition gives the same numbers, bit for bit, on
    the same machine with the same number of cores, backend and data. Note that a sweep gives each
    of its runs a share of the cores.

    A `prune` is repeated too, and the models that were tried are compared. The exit status is 1 if
    one of them differs.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """Folder of the run, or just its config.json."""
    out: OptionalPath = None
    """Folder for the new run. By default the original name with -again, next to the original or, \
for a run of a sweep, next to the sweep."""
    overwrite: bool = False
    """Replace the run in the folder of the new run once this one is finished."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Compare runs: print tables, and write figures, a table of all rows and a web page.

    If runs saved their tickets, these are compared as well: the kept weights of each layer, the
    overlap of masks between seeds and configurations next to the overlap expected by chance, and
    the share of kept weights that ended with the sign they started with.

    For folders of `prune`, report.html and model_card.md are written again from their results.
    """

    folders: _Folders
    """Run folders, or folders that contain run folders, such as that of a sweep or ./runs."""
    out: OptionalPath = None
    """Folder for report.html, tables.md, results.csv and *.png. Default: `report` inside \
FOLDER if there is only one, otherwise ./report."""
    quiet: bool = False
    """Print nothing but warnings and errors."""


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Write a saved model as a sparse SavedModel folder, TorchScript or ONNX file for serving."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A `.keras` file, masked or plain with zeros in its kernels, or a ticket (`.safetensors`)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder, such as served/1, or file, such as model.pt, to write. None is replaced."""
    overwrite: bool = False
    """Replace an existing SavedModel or file once the new one is complete."""
    values: Literal[
        "float32",
        "float16",
        "bfloat16",
        "int8",
        "codebook",
        "codebook-2",
        "codebook-3",
        "codebook-4",
        "codebook-5",
        "codebook-6",
        "codebook-7",
        "codebook-8",
    ] = "float32"
    """float32 keeps every value exactly. float16 and bfloat16 take 2 bytes; int8 and codebooks of \
2 to 8 bits take a byte or less. The resulting error of the outputs is printed. codebook chooses \
the bits of each weight by --tolerance, and is codebook-5 without it. --format onnx takes float32 \
and int8."""
    tolerance: OptionalFloat = None
    """Largest error of an output, relative to the largest output. If it is exceeded, nothing is \
written; with --format all, the other formats are."""
    sample_inputs: OptionalPath = None
    """An array of inputs (`.npy`), with which the error is measured. Default: random numbers."""
    level: int = 6
    """Compression level, 0 to 9."""
    include: Annotated[tuple[str, ...], NO_HINT] = ()
    """Regular expressions for the paths of weights that may be stored sparsely. Default: all."""
    format: Literal["saved_model", "torch", "onnx", "all"] = "saved_model"
    """torch writes a TorchScript file with the fastest kernel for every weight, and its report. \
onnx writes an ONNX file of the size of the non-zero weights. all writes a folder with every \
format whose packages are installed, and a table of bytes, output errors and latencies."""
    batch_size: int = 1
    """With --format torch or all: number of rows for which calls are measured."""
    threads: OptionalInt = None
    """With --format torch or all: number of threads with which they are measured. Default: that \
of each runtime."""
    timings: OptionalPath = None
    """With --format torch: report of an earlier export, by whose times kernels are chosen."""
    shrink: bool = False
    """With --format torch: remove channels without effect first."""
    json: bool = False
    """Print the result as a JSON document, and nothing else, on standard output."""


@dataclasses.dataclass(frozen=True)
class InspectOptions:
    """Print sparsity, encoding and bytes of every weight of a saved model."""

    path: tyro.conf.Positional[Path]
    """A `.keras` file, a ticket (`.safetensors`), a SavedModel folder, or one of `export --format \
all`, whose table is printed after every file was checked."""
    json: bool = False
    """Print the result as a JSON document, and nothing else, on standard output."""
