"""Identity of functions, classes, objects and models, independent of their names."""

import functools
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import textwrap
import threading

import keras
import numpy as np
import pytest

import masked_layers
from lottery_ticket_pruner import GradualPruning, criteria, training, treatments
from lottery_ticket_pruner.fingerprints import (
    UnidentifiedError,
    _Hasher,
    description,
    fingerprint,
    identity,
    layers,
)
from lottery_ticket_pruner.training import CropAndFlip

pytestmark = pytest.mark.once

# A user's module, and changes of its lines: whether each changes the identity of `score`.
SOURCE = '''
import re, functools, dataclasses, keras
import numpy as np
import own_helpers

ALPHA = 0.5
NAMES = {"a", "b", "c"}
PATTERN = re.compile("kernel")

def scale(x):
    return x * ALPHA

class Shift:
    slope = 2
    def __init__(self, by):
        self.by = by
    def __call__(self, x):
        return x * self.slope + self.by

@dataclasses.dataclass(frozen=True)
class Options:
    power: int = 2

def factory(k, table):
    def inner(x):
        return [x ** k, table.sum()]
    return inner

inner, shift = factory(3, np.arange(4)), Shift(1)

@functools.lru_cache
def count(n):
    return n if n < 2 else count(n - 1) + 1

def score(group, power=Options()):
    """Keeps what is large."""
    import own_deferred
    try:
        kept = [n for n in NAMES if PATTERN.match(n) or n in {"x", "y", "z"}]
    except ValueError:
        kept = []
    return scale(np.abs(group)), inner(group), shift(group), own_helpers.norm(group), kept, count(3)
'''
HELPERS = "def norm(x):\n    return x / 2\n\ndef unused(x):\n    return 1\n"
DEFERRED = "LIMIT = 3\n"
SAME = [
    ("import re,", "\n\n# A comment.\n\nimport re,"),
    ("Keeps what is large.", "Keeps what is largest."),
    ("return scale(", "# Now the rest.\n    return scale("),
]
OTHER = [
    ("ALPHA = 0.5", "ALPHA = 0.25"),
    ('"a", "b", "c"', '"a", "b", "d"'),
    ('"x", "y", "z"', '"x", "y", "w"'),
    ('compile("kernel")', 'compile("bias")'),
    ("x * ALPHA", "x / ALPHA"),
    ("slope = 2", "slope = 3"),
    ("* self.slope +", "* self.slope -"),
    ("Shift(1)", "Shift(2)"),
    ("power: int = 2", "power: int = 3"),
    ("x ** k", "x + k"),
    ("factory(3,", "factory(4,"),
    ("np.arange(4)", "np.arange(5)"),
    ("count(n - 1) + 1", "count(n - 1) + 2"),
    ("np.abs(group)", "np.sign(group)"),
    ("except ValueError", "except TypeError"),
    ("def score(group, power", "def score(group, degree"),
]
LOCK = threading.Lock()
PRINT = "import own; from lottery_ticket_pruner.fingerprints import fingerprint as f; " + (
    "print(f(own.score), f(own.Shift), f(own.shift), f(own.inner), f(own.count), f(own.NAMES))"
)


@pytest.fixture(autouse=True)
def _others_have_modules_of_these_names():
    yield
    for name in ("own", "own_helpers", "own_deferred"):
        sys.modules.pop(name, None)


def loaded(monkeypatch, folder, source=SOURCE, helpers=HELPERS, deferred=DEFERRED):
    """Imports the functions of a module as its file is now."""
    for name, text in (("own", source), ("own_helpers", helpers), ("own_deferred", deferred)):
        (folder / f"{name}.py").write_text(text)
        sys.modules.pop(name, None)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import own

    return own


def test_code_counts_and_lines_and_comments_do_not(monkeypatch, tmp_path):
    def found(*args):
        return fingerprint(loaded(monkeypatch, tmp_path, *args).score)

    first = found()
    assert re.fullmatch(r"python3\.\d+-[0-9a-f]{16}", first)
    for before, after in SAME:
        assert before in SOURCE
        assert found(SOURCE.replace(before, after)) == first, after
    seen = {first}
    for before, after in OTHER:
        assert before in SOURCE
        seen.add(found(SOURCE.replace(before, after)))
    assert len(seen) == len(OTHER) + 1
    assert found(SOURCE, HELPERS.replace("x / 2", "x / 3")) not in seen
    assert found(SOURCE, HELPERS.replace("return 1", "return 2")) == first
    assert found(SOURCE, HELPERS, "LIMIT = 4\n") not in seen


def test_every_process_finds_the_same(monkeypatch, tmp_path, capsys):
    loaded(monkeypatch, tmp_path)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", PRINT], env=env, capture_output=True, text=True, check=True
    )
    assert len(set(done.stdout.split())) == 6
    exec(PRINT, {})  # in this process
    assert capsys.readouterr().out == done.stdout


def test_closures_of_one_factory_methods_and_partials_differ():
    def factory(k):
        return lambda x: x * k

    class Times:
        def __init__(self, k):
            self.k = k

        def times(self, x):
            return x * self.k

    for make in (
        factory,
        Times,
        lambda k: Times(k).times,
        lambda k: functools.partial(np.power, k),
        lambda k: factory(np.full(3, k)),
        lambda k: factory(keras.ops.full((2,), k)),
        lambda k: factory(keras.Variable(np.full(3, k))),
        lambda k: factory([{"deep": {k}}]),
        lambda k: factory(np.random.default_rng(k)),
        lambda k: factory(factory(k)),
        lambda k: factory(keras.regularizers.L2(k)),
        lambda k: factory(np.array([k, "a"], dtype=object)),
    ):
        assert fingerprint(make(2)) == fingerprint(make(2))
        assert fingerprint(make(2)) != fingerprint(make(3))


def test_functions_that_name_each_other_come_to_an_end():
    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    assert fingerprint(even) != fingerprint(odd)


@pytest.mark.parametrize("known", [np.abs, np.mean, len, str.upper, keras.ops.relu, dict])
def test_objects_of_a_library_are_identified_by_name(known):
    assert fingerprint(known) != fingerprint(sum)
    assert description(known) == known.__name__


def test_objects_without_readable_state_are_reported(tmp_path):
    with open(tmp_path / "file", "w") as file:
        for thing, what in (
            (lambda group: file.write("x"), r"the variable `file` in its closure, a _io\."),
            (lambda group, lock=LOCK: lock, "a default, a _thread.lock"),
            (functools.partial(np.add, file), r"it, a _io\.|TextIOWrapper"),
        ):
            with pytest.raises(UnidentifiedError, match=what) as caught:
                fingerprint(thing)
            assert "get_config()" in str(caught.value)


class Scaled(keras.losses.Loss):
    """Inherits the configuration of its base, without `alpha`."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def call(self, y, p):
        return self.alpha * (y - p) ** 2


class Configured:
    def __init__(self, value):
        self.value, self.file = value, threading.Lock()

    def get_config(self):
        return {"value": self.value}


def test_objects_are_their_class_and_their_configuration():
    assert fingerprint(Configured(1)) == fingerprint(Configured(1))
    assert fingerprint(Configured(1)) != fingerprint(Configured(2))
    assert fingerprint(Scaled(1.0)) == fingerprint(Scaled(1.0))
    assert fingerprint(Scaled(1.0)) != fingerprint(Scaled(2.0))


def test_moved_and_renamed_objects_keep_their_earlier_names_in_fingerprints():
    names = {
        CropAndFlip: "lottery_ticket_pruner.augmentation.CropAndFlip",
        GradualPruning: "lottery_ticket_pruner.callbacks.GradualPruning",
        masked_layers.shrink: "masked_layers.shrinking.shrink",
        training.ArrayDataset: "lottery_ticket_pruner.training.dataset.Examples",
        training.to_arrays: "lottery_ticket_pruner.data.arrays_of",
        training.train: "lottery_ticket_pruner.training.train",
    }
    for thing, name in names.items():
        assert [*_Hasher("")._parts(thing, "")] == [name]


def test_descriptions_of_built_in_objects_do_not_change():
    assert description(CropAndFlip(2)) == "CropAndFlip(padding=2)"
    assert description("mse") == "mse"
    assert description(keras.losses.mean_squared_error) == "mean_squared_error"
    assert description([keras.regularizers.L1(0.5), None]) == [
        {"class_name": "L1", "l1": 0.5}, None,
    ]  # fmt: skip
    assert [identity(criteria.get(name)) for name in criteria.names()] == criteria.names()
    assert identity(treatments.get_pruned("zero")) == "zero"


def test_descriptions_of_custom_objects_have_their_code():
    wrapped = [
        keras.metrics.MeanMetricWrapper(lambda y, p, k=k: k * (y - p), name="one") for k in (1, 2)
    ]
    first, second = map(description, wrapped)
    assert first.pop("code") != second.pop("code")
    assert first == second
    one, other = (criteria.get(lambda group, k=k: group.final * k) for k in (1, 2))
    assert identity(one)["name"] == "<lambda>"
    assert identity(one)["code"] != identity(other)["code"]
    with_needs = criteria.Criterion(one.name, one.function, frozenset({"final"}))
    assert identity(with_needs) != identity(one)


def tanh(x):
    return keras.ops.tanh(x)


class Doubling(keras.layers.Layer):
    def call(self, x):
        return 2 * x


def net(activation="relu", rate=0.1, extra=keras.layers.Identity):
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(3, activation)(inputs)
    inner = keras.Sequential([keras.layers.Dense(3), keras.layers.BatchNormalization()])(hidden)
    hidden = keras.layers.Dropout(rate)(inner)
    joined = keras.layers.Add()([extra()(hidden), keras.layers.Dense(3)(inputs)])
    return keras.Model(inputs, joined)


def test_layers_are_the_same_after_other_layers_were_built():
    assert layers(net()) == layers(net())
    assert layers(net(tanh, extra=Doubling)) == layers(net(tanh, extra=Doubling))
    others = [net(), net("tanh"), net(tanh), net(rate=0.2), net(extra=Doubling)]
    assert len({layers(model) for model in others}) == len(others)


def test_custom_layers_with_changed_code_are_different(monkeypatch):
    before = layers(net(extra=Doubling))
    monkeypatch.setattr(Doubling, "call", lambda self, x: 3 * x)
    assert layers(net(extra=Doubling)) != before


def test_the_source_of_a_function_in_a_notebook_is_not_needed():
    made = []
    for factor in (1, 2):
        names = {"__name__": "__main__"}
        exec(textwrap.dedent(f"def score(x):\n    return x * {factor}"), names)
        made.append(fingerprint(names["score"]))
    assert made[0] != made[1]


PACKAGE = {
    "own_package/__init__.py": "from own_package.first import f\n",
    "own_package/first.py": "import own_package\nfrom . import second\n\ndef f(x):\n    return x\n",
    "own_package/second.py": "from own_package import first\nSCALE = 2\n",
    "own_package/scores.py": (
        "def absolute(x):\n    from own_package.first import f\n    return f(x)\n\n"
        "def relative(x):\n    from .second import SCALE\n    return x * SCALE\n\n"
        "def submodule(x):\n    from . import second\n    return x * second.SCALE\n"
    ),
}


def test_modules_that_import_each_other_come_to_an_end_and_count(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_package").mkdir()

    def found(scale):
        for name, text in PACKAGE.items():
            (tmp_path / name).write_text(text.replace("SCALE = 2", f"SCALE = {scale}"))
        for name in [name for name in sys.modules if name.partition(".")[0] == "own_package"]:
            monkeypatch.delitem(sys.modules, name)
        scores = importlib.import_module("own_package.scores")
        return [fingerprint(f) for f in (scores.absolute, scores.relative, scores.submodule)]

    first, again, other = found(2), found(2), found(30)
    assert first == again
    assert not set(first) & set(other)


def test_code_in_a_package_with_the_name_of_an_installed_one_counts(monkeypatch, tmp_path):
    """Folders like `tests` are often installed by some library, too."""
    found = []
    for number in (1, 2):
        name, file = f"jinja2.of_a_user_{number}", tmp_path / f"own_{number}.py"
        file.write_text(f"def score(group):\n    return group.current * {number}\n")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        found.append(fingerprint(module.score))
    assert found[0] != found[1]


def test_a_library_that_is_imported_late_is_identified_by_name(monkeypatch, tmp_path):
    folder = tmp_path / "site-packages"
    (folder / "late_library").mkdir(parents=True)
    (folder / "late_library" / "__init__.py").write_text("import late_library.part\n")
    (folder / "late_library" / "part.py").write_text("from late_library import other\n")
    (folder / "late_library" / "other.py").write_text("import late_library.part\n")
    monkeypatch.syspath_prepend(folder)

    def score(x):
        import late_library.part

        return late_library.part, x

    before = fingerprint(score)
    assert "late_library" not in sys.modules
    score(1)
    assert fingerprint(score) == before
