"""The benchmarks by name, with their contenders and goals."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report import Row
from benchmarks.timing import Contender, measure


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One row of the table: keys of two contenders, and the goal of their ratio (see `Row`)."""

    what: str
    ours: str
    peer: str
    theirs: str
    goal: float | None = None
    faster: bool = False
    unit: str = "ms a step"


@dataclasses.dataclass(frozen=True)
class Group:
    """Contenders that are measured in turns, and the comparisons between them."""

    contenders: Mapping[str, Contender]
    comparisons: tuple[Comparison, ...]
    repeats: int

    def rows(self, benchmark: str) -> Iterator[Row]:
        """Measures all contenders and yields the rows."""
        found, missing = measure(self.contenders, self.repeats)
        for row in self.comparisons:
            yield Row(
                benchmark=benchmark,
                what=row.what,
                ours=found.get(row.ours, []),
                peer=row.peer,
                theirs=found.get(row.theirs, []),
                unit=row.unit,
                goal=row.goal,
                faster=row.faster,
                missing=missing.get(row.ours) or missing.get(row.theirs, ""),
            )


def _on(backend: str, **environment: str) -> dict[str, str]:
    return {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}


# All benchmarks except `gpu` run on the CPU.
_CPU = {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}


def _training(setup: str, name: str, backend: str = "tensorflow", **arguments) -> Contender:
    return Contender(f"benchmarks.training:{setup}", name, arguments, _on(backend, **_CPU))


def _peer(setup: str, name: str, **arguments) -> Contender:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_USE_LEGACY_KERAS": "1", **_CPU}
    return Contender(f"benchmarks.peers:{setup}", name, arguments, environment)


def engine(quick: bool) -> Iterator[Group]:
    """Compares the engine with other training loops for the same network."""
    # An epoch of MNIST without the 5,000 images for validation, as in the paper.
    work: dict[str, Any] = {"steps": 60 if quick else 917, "batch_size": 60}
    lenet: dict[str, Any] = {"network": "lenet-300-100", **work}
    warm_up: dict[str, Any] = {"warm_up": 0.0} if quick else {}
    net = "LeNet-300-100, batch 60"
    repeats = 2 if quick else 7
    plain = _training("engine", "engine", **lenet, **warm_up)
    masked = _training("engine", "engine", **lenet, masks=True, **warm_up)
    # Few contenders at a time, since each waiting process occupies memory and caches.
    yield Group(
        {"plain": plain, "hand": _peer("hand_written", "hand", **work)},
        (
            Comparison(
                f"engine, {net}, TensorFlow", "plain", "hand-written XLA epoch", "hand", 1.15
            ),
        ),
        repeats,
    )
    yield Group(
        {
            "plain": plain,
            "fit": _training("fit", "fit", **lenet),
            "fit, 100": _training("fit", "fit", **lenet, steps_per_execution=100),
        },
        (
            Comparison(f"engine, {net}, TensorFlow", "plain", "Keras `fit`", "fit", 4.5, True),
            Comparison(
                f"engine, {net}, TensorFlow",
                "plain",
                "Keras `fit`, steps_per_execution=100",
                "fit, 100",
                faster=True,
            ),
        ),
        repeats,
    )
    yield Group(
        {
            "masked": masked,
            "torch": _peer("torch_prune", "torch", **work),
            "torch, fused": _peer("torch_prune", "torch, fused", **work),
        },
        (
            Comparison(
                f"engine, {net}, TensorFlow, masked",
                "masked",
                "torch eager, `nn.utils.prune`",
                "torch",
                3.0,
                True,
            ),
            Comparison(
                f"engine, {net}, TensorFlow, masked",
                "masked",
                "the same, Adam(fused=True)",
                "torch, fused",
                faster=True,
            ),
        ),
        repeats,
    )
    yield Group(
        {
            "masked": masked,
            "tfmot, 1": _peer("tfmot", "tfmot", **work, frequency=1),
            "tfmot, 100": _peer("tfmot", "tfmot", **work, frequency=100),
            "callback": _training("earlier_callback", "callback", **work),
        },
        (
            Comparison(
                f"engine, {net}, TensorFlow, masked",
                "masked",
                "tfmot on tf_keras, new masks every step",
                "tfmot, 1",
                faster=True,
            ),
            Comparison(
                f"engine, {net}, TensorFlow, masked",
                "masked",
                "tfmot on tf_keras, new masks every 100 steps",
                "tfmot, 100",
                faster=True,
            ),
            Comparison(
                f"engine, {net}, TensorFlow, masked",
                "masked",
                "Keras `fit`, callback at epoch start",
                "callback",
                faster=True,
            ),
        ),
        2 if quick else 3,
    )
    on_jax: dict[str, Any] = {"backend": "jax", **lenet}
    yield Group(
        {
            "plain": _training("engine", "engine", **on_jax, **warm_up),
            "fit": _training("fit", "fit", **on_jax),
        },
        (Comparison(f"engine, {net}, JAX", "plain", "Keras `fit`", "fit", faster=True),),
        repeats,
    )
    for backend, keras, network, name in (
        ("tensorflow", "TensorFlow", "conv-2", "Conv-2"),
        ("tensorflow", "TensorFlow", "resnet-20", "ResNet-20"),
        ("jax", "JAX", "conv-2", "Conv-2"),
    ):
        case: dict[str, Any] = {"backend": backend, "network": network, "batch_size": 60}
        case["steps"] = 2 if quick else 40
        yield Group(
            {
                "engine": _training("engine", "engine", **case, **warm_up),
                "fit": _training("fit", "fit", **case),
            },
            (
                Comparison(
                    f"engine, {name}, batch 60, {keras}", "engine", "Keras `fit`", "fit", 1.1
                ),
            ),
            2 if quick else 5,
        )


def masked(quick: bool) -> Iterator[Group]:
    """Compares steps of the masked network with those of the plain one, in the same loop."""
    for backend, keras, network, name, batch_size, steps, goal in (
        ("tensorflow", "TensorFlow", "conv-6", "Conv-6", 60, 10, 1.03),
        ("tensorflow", "TensorFlow", "transformer", "transformer block (d 256)", 32, 15, 1.03),
        ("tensorflow", "TensorFlow", "lenet-300-100", "LeNet-300-100", 60, 1834, 1.10),
        ("jax", "JAX", "transformer", "transformer block (d 256)", 32, 15, 1.03),
        ("jax", "JAX", "lenet-300-100", "LeNet-300-100", 60, 1834, 1.10),
    ):
        steps = max(2, steps // 30) if quick else steps
        case: dict[str, Any] = {"backend": backend, "network": network, "steps": steps}
        case["batch_size"] = batch_size
        yield Group(
            {
                "masked": _training("masked_and_plain", "masked", **case),
                "plain": _training("masked_and_plain", "plain", **case),
            },
            (
                Comparison(
                    f"masked step, {name}, batch {batch_size}, {keras}",
                    "masked",
                    "plain step, same loop",
                    "plain",
                    goal,
                ),
            ),
            2 if quick else 9,
        )


def conversion(quick: bool) -> Iterator[Group]:
    """Compares `convert_to_masked` with `clone_model`."""

    def contender(name):
        setup = "benchmarks.weights:conversion"
        return Contender(setup, name, {"quick": quick}, _on("tensorflow", **_CPU))

    yield Group(
        {"convert": contender("convert"), "clone": contender("clone")},
        (
            Comparison(
                "`convert_to_masked`, ResNet-50",
                "convert",
                "`clone_model`",
                "clone",
                2.0,
                unit="s",
            ),
        ),
        2 if quick else 7,
    )


def ranking(quick: bool) -> Iterator[Group]:
    """Compares a global `update_masks` with `numpy.partition` and others on the same numbers."""
    size = 100_000 if quick else 25_000_000
    setup = "benchmarks.weights:update"
    names = (
        *("first", "second", "partition", "argsort", "copy", "peak", "weights"),
        *("first_processor", "partition_processor"),
    )
    what = f"global `update_masks`, {size:,} weights"
    yield Group(
        {name: Contender(setup, name, {"size": size}, _on("tensorflow", **_CPU)) for name in names},
        (
            Comparison(what, "first", "`numpy.partition`", "partition", 2.5, unit="s"),
            Comparison(f"{what}, second time", "second", "the same", "partition", 2.5, unit="s"),
            Comparison(
                f"{what}, processor time",
                "first_processor",
                "the same",
                "partition_processor",
                2.5,
                unit="s",
            ),
            Comparison(what, "first", "argsort, the earlier way", "argsort", faster=True, unit="s"),
            Comparison(what, "first", "copy of the weights", "copy", unit="s"),
            Comparison(f"{what}, peak memory", "peak", "the weights", "weights", 3.0, unit="MB"),
        ),
        2 if quick else 7,
    )


def supermasks(quick: bool) -> Iterator[Group]:
    """Compares a grid of untrained masks with the matrix products alone."""
    examples, criteria, sparsities = (500, 2, 2) if quick else (10_000, 13, 25)
    for backend, keras in (("tensorflow", "TensorFlow"), ("jax", "JAX")):
        work = {"examples": examples, "criteria": criteria, "sparsities": sparsities}

        def contender(name, backend=backend, work=work):
            return Contender("benchmarks.supermasks:grid", name, work, _on(backend, **_CPU))

        yield Group(
            {"grid": contender("grid"), "products": contender("products")},
            (
                Comparison(
                    f"{criteria} criteria x {sparsities} sparsities of LeNet-300-100, "
                    f"{examples:,} images, {keras}",
                    "grid",
                    "its matrix products alone",
                    "products",
                    1.5,
                    unit="s",
                ),
            ),
            2 if quick else 5,
        )


def memory(quick: bool) -> Iterator[Group]:
    """Measures the memory that masks add to a model."""

    def contender(setup, name, **arguments):
        setup = f"benchmarks.weights:{setup}"
        arguments["quick"] = quick
        return Contender(setup, name, arguments, _on("tensorflow", **_CPU))

    yield Group(
        {
            "masked": contender("variables", "masked"),
            "plain": contender("variables", "plain"),
            "masked, resident": contender("resident", "resident", masks=True),
            "plain, resident": contender("resident", "resident", masks=False),
        },
        (
            Comparison(
                "masked ResNet-50, bytes of variables",
                "masked",
                "the plain one",
                "plain",
                1.27,
                unit="MB",
            ),
            Comparison(
                "masked copy of ResNet-50, resident memory",
                "masked, resident",
                "plain copy",
                "plain, resident",
                unit="MB",
            ),
        ),
        1,
    )


def gpu(quick: bool) -> Iterator[Group]:
    """Compares steps and memory of masked and plain networks in bfloat16 on JAX and torch."""

    def contender(name, backend, **arguments):
        # JAX would otherwise reserve three quarters of the memory for the first process.
        environment = _on(backend, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        return Contender("benchmarks.training:on_device", name, arguments, environment)

    for backend, keras in (("jax", "JAX"), ("torch", "torch")):
        for network, name, batch_size, shape, steps in (
            ("resnet-20", "ResNet-20", 128, (32, 32, 3), 200),
            ("resnet-50", "ResNet-50", 64, (224, 224, 3), 50),
        ):
            if quick:
                batch_size, shape, steps = 2, (32, 32, 3), 2
            case = {"network": network, "batch_size": batch_size, "shape": shape, "steps": steps}
            what = f"{name}, batch {batch_size}, bfloat16, {keras}"
            yield Group(
                {
                    f"{kind} {measured}": contender(measured, backend, **case, masks=masks)
                    for kind, masks in (("masked", True), ("plain", False))
                    for measured in ("step", "memory")
                },
                (
                    Comparison(
                        f"masked step, {what}", "masked step", "plain step", "plain step", 1.03
                    ),
                    Comparison(
                        f"memory of masked steps, {what}",
                        "masked memory",
                        "of plain steps",
                        "plain memory",
                        unit="MB",
                    ),
                ),
                2 if quick else 7,
            )


BENCHMARKS = {
    "engine": engine,
    "masked": masked,
    "ranking": ranking,
    "supermasks": supermasks,
    "conversion": conversion,
    "memory": memory,
    "gpu": gpu,
}
