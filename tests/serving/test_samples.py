"""`sample_inputs` in every structure that `predict` accepts, and messages about others."""

import keras
import numpy as np
import pytest

import masked_layers as ml
from masked_layers import _keras
from masked_layers.serving.samples import samples_of

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(3, 4)).astype("float32"), RNG.normal(size=(3, 5, 2)).astype("float32")


def head(a, b):
    return keras.layers.Dense(2)(a) + 3 * keras.ops.sum(b, axis=1)


def inputs():
    return keras.Input((4,), name="a"), keras.Input((None, 2), name="b")


def of_one():
    a, _ = inputs()
    return keras.Model(a, keras.layers.Dense(2)(a))


def of_list_of_one():
    a, _ = inputs()
    return keras.Model([a], keras.layers.Dense(2)(a))


def of_two():
    a, b = inputs()
    return keras.Model([a, b], head(a, b))


def of_tuple():
    a, b = inputs()
    return keras.Model((a, b), head(a, b))


def of_names():
    a, b = inputs()
    return keras.Model({"a": a, "b": b}, head(a, b))


def of_names_backwards():
    a, b = inputs()
    return keras.Model({"b": b, "a": a}, head(a, b))


def of_nests():
    a, b = inputs()
    return keras.Model({"left": [a], "right": {"b": b}}, head(a, b))


def of_column():
    a = keras.Input((1,), name="a")
    return keras.Model(a, keras.layers.Dense(2)(a))


FITTING = {
    "an array": (of_one, A),
    "a list of one": (of_one, [A]),
    "rows in lists": (of_one, A.tolist()),
    "one by name": (of_one, {"a": A}),
    "another type": (of_one, A.astype("float64")),
    "an array for a list of one": (of_list_of_one, A),
    "a list for a list of one": (of_list_of_one, [A]),
    "a tuple for a list of one": (of_list_of_one, (A,)),
    "a dict for a list of one": (of_list_of_one, {"a": A}),
    "a list": (of_two, [A, B]),
    "a tuple": (of_two, (A, B)),
    "a dict for a list": (of_two, {"b": B, "a": A}),
    "a list for a tuple": (of_tuple, [A, B]),
    "a dict for a tuple": (of_tuple, {"b": B, "a": A}),
    "a dict": (of_names, {"b": B, "a": A}),
    "a list for a dict": (of_names, [A, B]),
    "a dict in another order": (of_names_backwards, {"a": A, "b": B}),
    "a nest": (of_nests, {"left": [A], "right": {"b": B}}),
    "a nest with a tuple": (of_nests, {"right": {"b": B}, "left": (A,)}),
    "an axis of length 0": (of_two, [A, B[:, :0]]),
    "numbers for columns": (of_column, A[:, 0]),
    "too many axes": (of_column, A[:, :1, None]),
}


@pytest.mark.filterwarnings("ignore:The structure of `inputs`", "ignore:When providing `inputs`")
@pytest.mark.parametrize("kind", FITTING)
def test_inputs_accepted_by_predict_are_accepted(kind):
    make, given = FITTING[kind]
    model = make()
    found = samples_of(model, list(_keras.export_signature(model)), given)
    if kind in ("rows in lists", "a list of one", "too many axes"):
        given = A if make is of_one else A[:, :1]  # `predict` accepts them only in these forms.
    np.testing.assert_allclose(model(*found), model.predict(given, verbose=0), rtol=1e-5)


WRONG = {
    "an array for two": (of_two, A, "expected a list of 2, received a ndarray of shape"),
    "as many rows as inputs": (of_two, B[:2], "expected a list of 2"),
    "a list too short": (of_two, [A], "expected a list of 2, received a list of 1"),
    "a list too long": (of_one, [A, A], "for TensorSpec"),
    "two for a list of one": (of_list_of_one, [A, B], "expected a list of 1"),
    "a name missing": (of_two, {"a": A}, r"names \['a', 'b'\], received \['a'\]"),
    "a name too many": (of_two, {"a": A, "b": B, "c": A}, "received .*'c'"),
    "another name": (of_names, {"a": A, "c": B}, r"expected a dict of \['a', 'b'\], received"),
    "an array for a dict": (of_names, A, r"dict of \['a', 'b'\], received a ndarray"),
    "a list for a dict in another order": (of_names_backwards, [B, A], "expected a dict"),
    "the wrong way round": (of_two, [B, A], r"shape \(3, 5, 2\)"),
    "no rows": (of_two, [A[:0], B[:0]], "at least one row"),
    "no features": (of_one, A[:, :0], r"shape \(3, 0\)"),
    "texts": (of_one, [["b", "c", "d", "e"]], "for TensorSpec"),
    "objects": (of_one, np.array([[None] * 4]), "for TensorSpec"),
    "ragged rows": (of_one, [[1.0, 2.0], [1.0]], "for TensorSpec"),
    "nothing": (of_two, [], "received a list of 0"),
    "a flat nest": (of_nests, [A, B], "expected a dict"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_inputs_that_do_not_fit_are_refused(kind):
    make, given, message = WRONG[kind]
    model = make()
    expected = rf"(?s)^`sample_inputs` does not fit the model's inputs .*{message}"
    with pytest.raises(ValueError, match=expected):
        samples_of(model, list(_keras.export_signature(model)), given)


def test_several_arguments_are_a_list():
    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def call(self, a, b):
            return self.dense(a) + b

    model = Two()
    model(A, A[:, :2])
    specs = [keras.InputSpec(shape=(None, size), dtype="float32") for size in (4, 2)]
    signature = list(_keras.export_signature(model, specs))
    one, other = samples_of(model, signature, (A, A[:, :2]))
    np.testing.assert_array_equal(one, A)
    np.testing.assert_array_equal(other, A[:, :2])
    with pytest.raises(ValueError, match="expected a list of 2"):
        samples_of(model, signature, A)


def test_folders_are_compared_on_them(tmp_path):
    for number, (make, given) in enumerate([FITTING["an axis of length 0"], FITTING["a nest"]]):
        model = ml.convert_to_masked(make())
        report = ml.export_sparse_saved_model(model, tmp_path / str(number), sample_inputs=given)
        assert report.output_error < 1e-5
