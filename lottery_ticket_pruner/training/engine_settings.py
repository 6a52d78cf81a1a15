"""Settings of the engine for the whole process: when it switches between its ways of training."""

import dataclasses


@dataclasses.dataclass
class EngineSettings:
    """Thresholds of the engine. Assign to the attributes of its one instance, `training.settings`.

    Attributes:
        patience: Seconds in a compiled loop after which a few steps go through `fit`, to find out
            which is faster, if the rest of the training would take as long. Compiling `fit` takes
            about as long, so a shorter time would cost more than the result can save. After four
            times as many seconds, in trainings of any length, `fit` is tried in any case.
            `float("inf")` for never, as with `deterministic=True`.
        trial_steps: Minimum number of these steps.
        xla_steps: Number of training steps from which TensorFlow compiles the loop by XLA. This
            takes a second or more, and saves about a millisecond per step.
        part_bytes: Size of the copy of examples that each call of `fit` gets, unless the whole data
            set is smaller.
        least_savings: Number of multiply-adds of kernels and examples that a smaller model must
            save over a training to be trained in place of a sparse one, in the forward pass.
            Compiling the smaller model takes about as long. `float("inf")` for never.
    """

    patience: float = 3.0
    trial_steps: int = 40
    xla_steps: int = 300
    part_bytes: int = 2**28
    least_savings: float = 4e10


settings = EngineSettings()
