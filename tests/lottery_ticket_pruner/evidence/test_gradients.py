"""Dense gradients, against central differences in float64 and against each backend's own."""

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, _keras
from lottery_ticket_pruner.evidence import gradients
from masked_layers.masks import raw_view

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 6, 3)).astype("float32")
Y = RNG.integers(0, 4, size=10)
WEIGHT = RNG.uniform(0.5, 2, size=10).astype("float32")


@pytest.fixture
def float64():
    """Makes layers compute in float64."""
    with _keras.double_precision():
        yield


def small_model(loss=None, norm=False):
    """Nested, with a convolution, a layer used twice, a penalty, and partly pruned masks."""
    inner_input = keras.Input((4,))
    inner = keras.Model(inner_input, keras.layers.Dense(4, activation="tanh")(inner_input))
    x = inputs = keras.Input((6, 3))
    x = keras.layers.Conv1D(4, 3, activation="tanh", kernel_regularizer="l2")(x)
    if norm:
        x = keras.layers.BatchNormalization()(x)
    x = inner(inner(keras.layers.GlobalAveragePooling1D()(x)))
    model = ml.convert_to_masked(keras.Model(inputs, keras.layers.Dense(4)(x)))
    prune_some(model)
    model.compile("sgd", loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def prune_some(model, share=0.4):
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) > share for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)


def state(model):
    variables = [*model.variables, *model.metrics_variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def compiled_loss(model):
    """Returns the compiled loss of a plain model, computed without its trainer."""
    return float(keras.ops.convert_to_numpy(model.loss(Y, model(X, training=True))))


def test_kept_and_pruned_entries_agree_with_central_differences(float64):
    model = small_model()
    found = gradients.loss_gradients(model, X, Y, batch_size=5)
    # A copy in which pruned entries are zeros of kept weights.
    bare = ml.strip_masks(model)
    step = 1e-5
    for ref in ml.weight_refs(bare):
        values = keras.ops.convert_to_numpy(ref.variable).copy()
        mask = ml.get_masks(model)[ref.path]
        for index in [*np.argwhere(mask)[:4], *np.argwhere(~mask)[:4]]:
            around = []
            for sign in (1, -1):
                moved = values.copy()
                moved[tuple(index)] += sign * step
                ref.variable.assign(moved)
                around.append(compiled_loss(bare))
            expected = (around[0] - around[1]) / (2 * step)
            assert found[ref.path].dtype == "float64"
            assert found[ref.path][tuple(index)] == pytest.approx(expected, rel=1e-6, abs=1e-9)
            assert expected != 0
        ref.variable.assign(values)


def test_kept_entries_have_the_gradient_that_an_sgd_step_follows():
    model = small_model()
    for variable in model.trainable_variables:
        variable.regularizer = None
    model.optimizer.learning_rate = 1.0
    found = gradients.loss_gradients(model, X, Y, sample_weight=WEIGHT)
    before = {ref.path: keras.ops.convert_to_numpy(ref.variable) for ref in ml.masked_refs(model)}
    before = {path: value.copy() for path, value in before.items()}
    model.fit(X, Y, sample_weight=WEIGHT, batch_size=len(X), verbose=0)
    for ref in ml.masked_refs(model):
        step = before[ref.path] - keras.ops.convert_to_numpy(ref.variable)
        alive = keras.ops.convert_to_numpy(ref.mask.value)
        np.testing.assert_allclose(step, found[ref.path] * alive, rtol=1e-4, atol=1e-6)


def test_the_mean_does_not_depend_on_the_batch_size():
    model = small_model()
    whole = gradients.loss_gradients(model, X, Y, sample_weight=WEIGHT, batch_size=10)
    parts = gradients.loss_gradients(model, X, Y, sample_weight=WEIGHT, batch_size=4)
    for path, array in whole.items():
        np.testing.assert_allclose(parts[path], array, rtol=1e-4, atol=1e-6)


def test_a_penalty_on_weights_does_not_count_and_an_added_loss_does():
    class Adding(keras.layers.Layer):
        def call(self, x):
            self.add_loss(100 * keras.ops.mean(keras.ops.square(x)))
            return x

    def build(*extra, penalty=None):
        keras.utils.set_random_seed(3)
        model = keras.Sequential(
            [
                keras.Input((6, 3)),
                keras.layers.Flatten(),
                keras.layers.Dense(4, kernel_regularizer=penalty, name="dense"),
                *extra,
            ]
        )
        model = ml.convert_to_masked(model)
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return gradients.loss_gradients(model, X, Y)["dense/kernel"]

    plain = build()
    np.testing.assert_array_equal(build(penalty=keras.regularizers.L2(10.0)), plain)
    assert np.abs(build(Adding()) - plain).max() > 1


def test_the_model_stays_as_it_was_and_nothing_is_traced_again(monkeypatch):
    inputs = keras.Input((6, 3))
    x = keras.layers.Dropout(0.5, seed=1)(keras.layers.Dense(5)(inputs))
    x = keras.layers.Flatten()(keras.layers.BatchNormalization()(x))
    outputs = [keras.layers.Dense(4, name="a")(x), keras.layers.Dense(1, name="b")(x)]
    model = ml.convert_to_masked(keras.Model(inputs, outputs))
    prune_some(model)
    losses = [keras.losses.SparseCategoricalCrossentropy(from_logits=True), "mse"]
    model.compile("adam", losses, metrics=[["accuracy"], ["mae"]])
    targets = [Y, WEIGHT[:, None]]
    model.optimizer.build(model.trainable_variables)
    model.evaluate(X, targets, verbose=0)
    before = state(model)
    traces = []
    original = gradients._Loss._value
    monkeypatch.setattr(
        gradients._Loss, "_value", lambda *args: traces.append(1) or original(*args)
    )
    first = gradients.loss_gradients(model, X, targets, batch_size=5)
    count = len(traces)
    second = gradients.loss_gradients(model, X, targets, batch_size=5)
    for path, array in first.items():
        np.testing.assert_array_equal(second[path], array)  # dropout starts from the same seed
    for old, new in zip(before, state(model), strict=True):
        np.testing.assert_array_equal(new, old)
    if BACKEND != "torch":
        assert count == 1
        assert len(traces) == 1
    prune_some(model, share=0.9)  # takes effect without a new trace
    third = gradients.loss_gradients(model, X, targets, batch_size=5)
    assert any(np.abs(third[path] - array).max() > 1e-3 for path, array in first.items())
    assert BACKEND == "torch" or len(traces) == 1
    model.compile("adam", ["sparse_categorical_crossentropy", "mae"])
    fourth = gradients.loss_gradients(model, X, targets, batch_size=5)
    assert any(np.abs(fourth[path] - array).max() > 1e-3 for path, array in third.items())


@pytest.mark.once
def test_tensorflow_does_not_warn_of_retracing_when_many_models_are_measured(caplog):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
    for number in range(6):  # It would, from five functions with the same code on.
        add = gradients.compiled(model, lambda values, batch: [batch["x"] + v for v in values])
        (total,) = add([keras.ops.ones(1)], {"x": keras.ops.ones(1) * number})
        assert float(total[0]) == number + 1
    assert "retracing" not in caplog.text


def test_batch_normalization_takes_the_statistics_of_the_batch():
    model = small_model(norm=True)
    before = gradients.loss_gradients(model, X, Y)
    statistics = [v for v in model.non_trainable_weights if "moving" in v.name]
    assert len(statistics) == 2
    for variable in statistics:
        variable.assign(variable + 5.0)
    after = gradients.loss_gradients(model, X, Y)
    for path, array in before.items():
        np.testing.assert_array_equal(after[path], array)


def test_it_can_be_asked_for_while_the_model_trains():
    class Ask(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.last = gradients.loss_gradients(self.model, X, Y)

    model, ask = small_model(), Ask()
    model.fit(X, Y, batch_size=5, verbose=0, callbacks=[ask])
    for path, array in gradients.loss_gradients(model, X, Y).items():
        np.testing.assert_allclose(ask.last[path], array, rtol=1e-5, atol=1e-7)


def numpy_loss(weights, x, y, temperature):
    """Two dense layers with a tanh between them, and the cross-entropy of their divided logits."""
    logits = np.tanh(x @ weights[:6].reshape(3, 2)) @ weights[6:].reshape(2, 3) / temperature
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return -logits[np.arange(len(y)), y].mean()


def differences(function, at, step):
    """Returns the gradient and the Hessian of a function by central differences."""
    moves = step * np.eye(len(at))
    slopes = np.array([function(at + a) - function(at - a) for a in moves]) / (2 * step)
    bends = [
        [
            function(at + a + b)
            - function(at + a - b)
            - function(at - a + b)
            + function(at - a - b)
            for b in moves
        ]
        for a in moves
    ]
    return slopes, np.array(bends) / (4 * step**2)


@pytest.mark.parametrize("outputs", ["logits", "softmax"])
def test_the_hessian_times_the_gradient_agrees_with_differences_in_numpy(float64, outputs):
    activation = None if outputs == "logits" else "softmax"
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(2, activation="tanh", use_bias=False, name="a"),
            keras.layers.Dense(3, activation=activation, use_bias=False, name="b"),
        ]
    )
    model = ml.convert_to_masked(model)
    prune_some(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=outputs == "logits")
    model.compile("sgd", loss if outputs == "logits" else "sparse_categorical_crossentropy")
    x, y = X[:8, 0].astype("float64"), Y[:8] % 3
    weights = ml.strip_masks(model).get_weights()
    at = np.concatenate([weight.ravel() for weight in weights])
    slopes, bends = differences(lambda w: numpy_loss(w, x, y, 200.0), at, 1e-3)
    expected = np.split(bends @ slopes, [6])
    found = gradients.hessian_gradients(model, x, y, batch_size=4)
    for array, wanted in zip(found.values(), expected, strict=True):
        np.testing.assert_allclose(array.ravel(), wanted, rtol=2e-3, atol=1e-11)
    slopes, _ = differences(lambda w: numpy_loss(w, x, y, 1.0), at, 1e-5)
    for array, wanted in zip(
        gradients.loss_gradients(model, x, y, batch_size=4).values(),
        np.split(slopes, [6]),
        strict=True,
    ):
        np.testing.assert_allclose(array.ravel(), wanted, rtol=1e-5, atol=1e-9)


def in_torch(weights, masks, x, y):
    """Returns the gradient, and its product with the Hessian, of a net built in torch only."""
    import torch

    kernels = [
        torch.tensor(np.where(mask, weight, 0), dtype=torch.float64, requires_grad=True)
        for weight, mask in zip(weights[::2], masks, strict=True)
    ]
    biases = [torch.tensor(bias, dtype=torch.float64) for bias in weights[1::2]]

    def loss(temperature):
        hidden = torch.tensor(x, dtype=torch.float64)
        for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
            hidden = torch.tanh(hidden @ kernel + bias)
        logits = hidden @ kernels[-1] + biases[-1]
        return torch.nn.functional.cross_entropy(logits / temperature, torch.tensor(y))

    slopes = torch.autograd.grad(loss(1.0), kernels)
    cool = torch.autograd.grad(loss(200.0), kernels, create_graph=True)
    along = sum((slope * slope.detach()).sum() for slope in cool)
    bends = torch.autograd.grad(along, kernels)
    return [slope.numpy() for slope in slopes], [bend.numpy() for bend in bends]


def test_torch_gives_the_same_gradients_scores_and_masks(float64):
    pytest.importorskip("torch")
    inner = [
        keras.layers.Dense(units, activation=activation)
        for units, activation in ((7, "tanh"), (5, "tanh"), (4, None))
    ]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), *inner]))
    model.set_weights([RNG.normal(size=weight.shape) for weight in model.get_weights()])
    prune_some(model)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = X[:, 0].astype("float64")
    masks, weights = ml.get_masks(model), model.get_weights()
    slopes, bends = in_torch(weights, list(masks.values()), x, Y)
    found = gradients.loss_gradients(model, x, Y)
    for array, slope in zip(found.values(), slopes, strict=True):
        np.testing.assert_allclose(array, slope, rtol=1e-9, atol=1e-13)
    found = gradients.hessian_gradients(model, x, Y)
    for array, bend in zip(found.values(), bends, strict=True):
        np.testing.assert_allclose(array, bend, rtol=1e-7, atol=1e-16)

    def joined(arrays):
        return np.concatenate([array.ravel() for array in arrays])

    weight, alive = joined(weights[::2]), joined(masks.values())
    scores = {
        "gradient": np.abs(joined(slopes)),
        "snip": np.abs(joined(slopes) * weight),
        "grasp": joined(bends) * weight,
    }
    pruner = LotteryTicketPruner(model)
    for name, score in scores.items():
        ml.set_masks(model, masks)
        pruner.update_masks(name, rate=0.5, scope="global", data=(x, Y))
        dropped = np.argsort(np.where(alive, score, np.inf))[: alive.sum() // 2]
        expected = alive.copy()
        expected[dropped] = False
        np.testing.assert_array_equal(joined(ml.get_masks(model).values()), expected)


def test_binary_outputs_are_cooled_and_other_losses_are_not(float64):
    def found(loss, activation, temperature):
        keras.utils.set_random_seed(1)
        dense = keras.layers.Dense(1, name="dense")
        model = keras.Sequential(
            [
                keras.Input((3,)),
                dense,
                keras.layers.Rescaling(1 / temperature),
                keras.layers.Activation(activation),
            ]
        )
        model = ml.convert_to_masked(model)
        model.compile("sgd", loss)
        y = (Y % 2)[:, None]
        return gradients.hessian_gradients(model, X[:, 0].astype("float64"), y)["dense/kernel"]

    def unknown(y_true, y_pred):
        return keras.losses.binary_crossentropy(y_true, y_pred, from_logits=True)

    expected = found(unknown, "linear", 200.0)
    np.testing.assert_allclose(found("binary_crossentropy", "sigmoid", 1.0), expected, rtol=1e-6)
    logits = keras.losses.BinaryCrossentropy(from_logits=True)
    np.testing.assert_allclose(found(logits, "linear", 1.0), expected, rtol=1e-6)
    assert np.abs(found(unknown, "linear", 1.0) / expected).min() > 100


def test_attention_has_a_second_derivative():
    inputs = keras.Input((6, 3))
    x = keras.layers.MultiHeadAttention(2, 3)(inputs, inputs)
    outputs = keras.layers.Dense(4)(keras.layers.Flatten()(x))
    model = ml.convert_to_masked(keras.Model(inputs, outputs))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = gradients.hessian_gradients(model, X, Y)
    assert len(found) == 5
    assert all(np.isfinite(array).all() and array.any() for array in found.values())


def test_low_rank_factors_are_part_of_the_effective_weight():
    dense = keras.layers.Dense(4, name="dense")
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.Flatten(), dense])
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(RNG.normal(size=dense.lora_kernel_b.shape))
    merged = keras.Sequential(
        [keras.Input((6, 3)), keras.layers.Flatten(), keras.layers.Dense(4, name="dense")]
    )
    masked = [ml.convert_to_masked(each) for each in (model, merged)]
    with raw_view():
        masked[1].layers[-1].kernel.assign(keras.ops.convert_to_numpy(dense.kernel))
    found = []
    for each in masked:
        prune_some(each)
        each.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        found.append(gradients.loss_gradients(each, X, Y)["dense/kernel"])
    np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_loses_no_small_gradients(policy):
    def build(policy):
        dense = [keras.layers.Dense(8, "tanh", dtype=policy), keras.layers.Dense(4, dtype=policy)]
        model = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), *dense]))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    full, mixed = build("float32"), build(policy)
    mixed.set_weights(full.get_weights())
    for function in (gradients.loss_gradients, gradients.hessian_gradients):
        pairs = zip(*(function(model, X[:, 0], Y).values() for model in (full, mixed)), strict=True)
        for expected, found in pairs:
            np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert all(layer.dtype_policy.name == policy for layer in mixed.layers)


@pytest.mark.once
def test_the_logits_of_every_cross_entropy_are_divided_however_it_is_given():
    inputs = keras.Input((3,))
    hidden = keras.layers.Dense(4, activation="tanh", name="hidden")(inputs)
    ends = {name: keras.layers.Dense(4, "softmax", name=name)(hidden) for name in "ba"}
    plain = keras.Model(inputs, list(ends.values()))
    loss = "sparse_categorical_crossentropy"

    def hidden_product(loss, targets, outputs=None):
        model = keras.Model(inputs, outputs) if outputs is not None else plain
        model = ml.convert_to_masked(model)
        model.compile("sgd", loss)
        return gradients.hessian_gradients(model, X[:, 0], targets)["hidden/kernel"]

    alone = hidden_product(loss, Y, ends["b"])
    assert alone.any()
    for same in ([loss], {"b": loss}):
        np.testing.assert_allclose(hidden_product(same, Y, ends["b"]), alone, rtol=1e-4)
    np.testing.assert_allclose(hidden_product([loss, None], [Y, None]), alone, rtol=1e-4)
    both = hidden_product([loss, loss], [Y, Y])
    for same in (loss, {"a": loss, "b": loss}):
        np.testing.assert_allclose(hidden_product(same, [Y, Y]), both, rtol=1e-4)
    assert np.abs(both - alone).max() > np.abs(alone).max() / 10


@pytest.mark.once
def test_a_plain_model_gives_all_that_can_be_pruned():
    model = keras.Sequential([keras.Input((6, 3)), keras.layers.Flatten(), keras.layers.Dense(4)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    masked = ml.convert_to_masked(model)
    plain, masked = (gradients.loss_gradients(each, X, Y) for each in (model, masked))
    np.testing.assert_array_equal(plain["dense/kernel"], masked["dense/kernel"])


@pytest.mark.once
def test_models_without_a_loss_and_invalid_data_are_refused():
    model = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)]))
    with pytest.raises(ValueError, match=r"not compiled.*compile\(loss"):
        gradients.loss_gradients(model, X[:, 0], Y)
    model.compile(loss="mse")
    with pytest.raises(ValueError, match=r"lengths \[3, 10\]"):
        gradients.loss_gradients(model, X[:, 0], Y[:3])
    with pytest.raises(ValueError, match=r"lengths \[0\]"):
        gradients.loss_gradients(model, X[:0, 0], Y[:0])
