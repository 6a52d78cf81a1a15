"""Settings of the engine for the whole process: when it changes the way in which it trains."""

import dataclasses


@dataclasses.dataclass
class EngineSettings:
    """What the engine decides by; its one instance is `training.settings`, to be assigned to.

    Attributes:
        patience: Seconds in a compiled loop after which a few steps go through `fit`, to see which
            is faster. Compiling `fit` takes about as many: asking earlier costs more than the
            answer can save. `float("inf")`: never, as with `deterministic=True`.
        trial_steps: Least number of these steps.
        xla_steps: Steps of a training from which on TensorFlow compiles its loop by XLA. That takes
            a second or more, and saves about a millisecond a step.
        part_bytes: What `fit` is given at a time is a copy: of so many bytes, or of as many
            examples as there are where these are more.
    """

    patience: float = 3.0
    trial_steps: int = 40
    xla_steps: int = 300
    part_bytes: int = 2**28


settings = EngineSettings()
