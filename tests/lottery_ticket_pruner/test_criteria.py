"""Each criterion on arrays small enough to compute by hand, and the identifiers of `get`."""

import numpy as np
import pytest
from scipy.stats import rankdata

from lottery_ticket_pruner import criteria, selection

pytestmark = pytest.mark.once

INITIAL = [0.5, -3.0, 2.0, -1.0, 4.0, -2.5, 1.5, 3.5]
FINAL = [1.0, -3.1, -2.0, 0.5, 3.0, -5.0, 4.0, 0.1]
# abs(w0)   0.5   3.0   2.0  1.0  4.0   2.5  1.5  3.5
# abs(wf)   1.0   3.1   2.0  0.5  3.0   5.0  4.0  0.1
# sign      same  same  flip flip same  same same same
EVIDENCE = [-2.0, 0.6, 0.7, 8.0, -0.1, -0.3, 0.4, 20.0]
# times wf  -2.0 -1.86 -1.4  4.0 -0.3   1.5  1.6  2.0
HALF = {
    "large_final": [0, 1, 0, 0, 1, 1, 1, 0],
    "small_final": [1, 0, 1, 1, 0, 0, 0, 1],
    "large_init": [0, 1, 0, 0, 1, 1, 0, 1],
    "small_init": [1, 0, 1, 1, 0, 0, 1, 0],
    # ranks of abs(w0): 0 5 3 1 7 4 2 6; of abs(wf): 2 5 3 1 4 7 6 0; the smaller: 0 5 3 1 4 4 2 0
    "large_init_large_final": [0, 1, 1, 0, 1, 1, 0, 0],
    # 7 less those: 7 2 4 6 0 3 5 1 and 5 2 4 6 3 0 1 7; the smaller: 5 2 4 6 0 0 1 1
    "small_init_small_final": [1, 1, 1, 1, 0, 0, 0, 0],
    # 0.5 0.1 0.0 -0.5 -1.0 2.5 2.5 -3.4
    "magnitude_increase": [1, 1, 0, 0, 0, 1, 1, 0],
    # 0.5 0.1 4.0 1.5 1.0 2.5 2.5 3.4
    "movement": [0, 0, 1, 0, 0, 1, 1, 1],
    # 1.0 3.1 - - 3.0 5.0 4.0 0.1
    "large_final_same_sign": [0, 1, 0, 0, 1, 1, 1, 0],
    # 0.5 0.1 - - -1.0 2.5 2.5 -3.4
    "magnitude_increase_same_sign": [1, 1, 0, 0, 0, 1, 1, 0],
    "smallest_weights": [0, 1, 0, 0, 1, 1, 1, 0],
    "smallest_weights_global": [0, 1, 0, 0, 1, 1, 1, 0],
    "snip": [1, 1, 0, 1, 0, 0, 0, 1],
    "grasp": [0, 0, 0, 1, 0, 1, 1, 1],
    "synflow": [1, 1, 0, 1, 0, 0, 0, 1],
    "gradient": [1, 0, 1, 1, 0, 0, 0, 1],
    "saliency": [1, 1, 0, 1, 0, 0, 0, 1],
    # -2.0 1.86 1.4 4.0 -0.3 -1.5 1.6 2.0
    "wanda": [0, 1, 0, 1, 0, 0, 1, 1],
}


def prune(name, drop, initial=INITIAL, final=FINAL, mask=None, seed=0):
    """Returns the mask of one kernel as a list of 0 and 1. Current weights are the final ones."""
    mask = np.ones(len(final), dtype=bool) if mask is None else np.array(mask, dtype=bool)

    def column(values):
        return np.array(values, dtype=np.float32)[:, None]

    kernel = selection.Weights(
        initial=column(initial),
        final=column(final),
        current=column(final),
        mask=mask[:, None],
        **dict.fromkeys(criteria.EVIDENCE, column(np.resize(EVIDENCE, len(mask)))),
    )
    rate = drop / np.count_nonzero(mask)
    masks = selection.update(name, {"kernel": kernel}, rate=rate, seed=seed)
    return masks["kernel"].ravel().tolist()


@pytest.mark.parametrize("name", HALF)
def test_half_of_eight_by_hand(name):
    assert prune(name, 4) == HALF[name]


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("gradient", lambda w: abs(w["gradient"])),
        ("saliency", lambda w: abs(w["gradient"] * w["final"])),
        ("snip", lambda w: abs(w["gradient"] * w["current"])),
        ("grasp", lambda w: w["hessian_gradient"] * w["current"]),
        ("synflow", lambda w: abs(w["flow"] * w["current"])),
        ("wanda", lambda w: abs(w["current"]) * w["input_norm"]),
    ],
)
def test_weights_are_pruned_in_the_order_of_their_scores(name, score):
    rng = np.random.default_rng(0)
    names = (*criteria.RECORDS, *criteria.EVIDENCE)
    values = {each: rng.standard_normal(30).astype(np.float32) for each in names}
    values["input_norm"] = abs(values["input_norm"])
    kernel = selection.Weights(
        mask=np.ones((30, 1), bool), **{each: array[:, None] for each, array in values.items()}
    )
    order = np.argsort(score(values))
    for drop in range(30):
        mask = selection.update(name, {"kernel": kernel}, rate=drop / 30)["kernel"]
        assert sorted(np.flatnonzero(~mask)) == sorted(order[:drop])


def test_the_lower_of_two_ranks_decides_among_many_weights():
    rng = np.random.default_rng(0)
    initial, final = np.round(rng.standard_normal((2, 9000)), 3)  # With ties.
    lower = np.minimum(rankdata(abs(initial), "min"), rankdata(abs(final), "min"))
    for drop in (1, 3, 60, 900, 4500, 8000, 8999):
        mask = np.array(prune("large_init_large_final", drop, initial, final), bool)
        assert np.count_nonzero(~mask) == drop
        assert lower[~mask].max() <= lower[mask].min()


def test_every_criterion_is_tested_by_hand():
    elsewhere = {"random", "large_final_diff_sign", "magnitude_increase_diff_sign"}
    assert set(HALF) | elsewhere == set(criteria.names())


def test_criteria_are_declared_as_in_their_papers():
    found = [criteria.get(name) for name in criteria.names()]
    # Of ranks and of random numbers, a part has others than the whole.
    whole = {"random", "large_init_large_final", "small_init_small_final"}
    assert {each.name for each in found if not each.elementwise} == whole
    assert {each.name for each in found if each.at_initialization} == {"snip", "grasp", "synflow"}
    assert {each.name: each.rounds for each in found if each.rounds > 1} == {"synflow": 100}
    assert {each.name: each.scope for each in found if each.scope} == {
        **dict.fromkeys(["snip", "grasp", "synflow", "smallest_weights_global"], "global"),
        "wanda": "output",
    }


def test_large_final_diff_sign_keeps_the_largest_flipped():
    assert prune("large_final_diff_sign", 6) == [0, 0, 1, 1, 0, 0, 0, 0]
    assert prune("large_final_diff_sign", 7) == [0, 0, 1, 0, 0, 0, 0, 0]


def test_magnitude_increase_diff_sign_keeps_the_flipped_that_grew():
    initial, final = [1, -1, 2, -2], [-3, 2, 9, 1]
    assert prune("magnitude_increase_diff_sign", 1, initial, final) == [1, 1, 0, 1]
    assert prune("magnitude_increase_diff_sign", 2, initial, final) == [1, 1, 0, 0]
    assert prune("magnitude_increase_diff_sign", 3, initial, final) == [1, 0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["large_final_same_sign", "magnitude_increase_same_sign"])
def test_flipped_weights_are_pruned_before_a_right_sign_of_magnitude_zero(name, seed):
    initial = [9, -9, 9, 1, -1]
    final = [0, -0.0, 1e-30, -8, 8]
    assert prune(name, 2, initial, final, seed=seed) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["large_final_diff_sign", "magnitude_increase_diff_sign"])
def test_kept_signs_are_pruned_before_a_flip_of_magnitude_zero(name, seed):
    initial = [9, -9, 9, 1, -1]
    final = [0, -0.0, -1e-30, 8, -8]
    assert prune(name, 2, initial, final, seed=seed) == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("name", [n for n in criteria.names() if n.endswith("_sign")])
def test_an_initial_zero_has_no_sign_that_could_be_wrong(name):
    wrong = -5 if "same" in name else 5
    assert prune(name, 1, [0, 0, 1], [4, -4, wrong]) == [1, 1, 0]


@pytest.mark.parametrize("name", [n for n in criteria.names() if n.endswith("_sign")])
def test_equally_wrong_signs_are_pruned_in_an_order_that_the_seed_decides(name):
    final = [1, 2, 3, 4] if "diff" in name else [-1, -2, -3, -4]
    masks = [tuple(prune(name, 2, [1, 1, 1, 1], final, seed=seed)) for seed in range(40)]
    assert all(sum(mask) == 2 for mask in masks)
    assert len(set(masks)) == 6  # all pairs out of four


def test_ranks_count_only_kept_weights():
    initial = [1, 2, 3, 4, 9, 9]
    final = [6, 3, 4, 5, 9, 9]
    alive = [1, 1, 1, 1, 0, 0]
    # ranks 0 1 2 3 and 3 0 1 2: the smaller ones are 0 0 1 2
    assert prune("large_init_large_final", 2, initial, final, alive) == [0, 0, 1, 1, 0, 0]
    # A pruned weight between two kept ones would shift the ranks and thereby the minimum.
    initial, final, alive = [1, 5, 2, 3, 4], [9, 1, 8, 8.5, 8.7], [1, 1, 0, 0, 0]
    masks = {tuple(prune("large_init_large_final", 1, initial, final, alive, s)) for s in range(20)}
    assert masks == {(1, 0, 0, 0, 0), (0, 1, 0, 0, 0)}  # both have rank 0 once: a tie


def test_equal_values_share_a_rank():
    initial, final = [1, 1, 1, 1, 2], [3, 2, 1, 4, 5]
    masks = {tuple(prune("large_init_large_final", 2, initial, final, seed=s)) for s in range(60)}
    assert len(masks) == 6
    assert all(mask[4] for mask in masks)


def test_random_depends_on_the_seed_and_keeps_the_count():
    masks = [tuple(prune("random", 4, seed=seed)) for seed in range(30)]
    assert {sum(mask) for mask in masks} == {4}
    assert len(set(masks)) > 15
    assert masks == [tuple(prune("random", 4, seed=seed)) for seed in range(30)]


def test_random_drops_every_weight_equally_often():
    dropped = 8 - np.sum([prune("random", 2, seed=seed) for seed in range(2000)], axis=0) / 250
    np.testing.assert_allclose(dropped, 2, atol=0.4)  # 5 standard deviations of 500 / 250


def test_scores_of_channels_are_those_of_loops():
    rng = np.random.default_rng(0)
    mask = np.array([1, 1, 0, 1, 1], bool)
    kernels = [rng.standard_normal((5, size)) * mask[:, None] for size in (3, 7)]
    kernels[1][4] = kernels[1][3]  # Of equal filters, no rounding makes a distance NaN.
    scales = [np.array([1, 2, np.nan, 4, 5]), np.array([3, np.nan, np.nan, 1, 0.5])]
    group = criteria.ChannelGroup(mask=mask, rng=rng, kernels=kernels, scales=scales)
    distances = [
        np.mean([sum(np.linalg.norm(k[i] - k[j]) for j in np.flatnonzero(mask)) for k in kernels])
        for i in range(5)
    ]
    found = criteria.get("geometric_median").scores(group)
    np.testing.assert_allclose(found[mask], np.array(distances)[mask], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(criteria.get("scale").scores(group)[mask], [2, 2, 2.5, 2.75])


# --- Get and register -----------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())


@pytest.mark.parametrize("name", criteria.names())
def test_every_name_round_trips_and_describes_itself(name):
    criterion = criteria.get(name)
    assert criterion.name == name
    assert criteria.get(criterion) is criterion
    assert criteria.get(criterion.function) is criterion
    assert criteria.get(criterion.get_config()) is criterion
    assert criteria.Criterion.from_config(criterion.get_config()) is criterion
    assert criterion.doc.endswith(".")
    assert len(criterion.doc) < 100


def test_keras_serialized_form_is_understood():
    keras = pytest.importorskip("keras")
    criterion = criteria.get("movement")
    config = keras.saving.serialize_keras_object(criterion)
    assert config["class_name"] == "Criterion"
    assert criteria.get(config) is criterion


def test_a_registered_function_works_by_name_and_round_trips(registry):
    @criteria.register("small_step", needs={"initial", "final"})
    def small_step(group):
        """Keeps the weights that moved least."""
        return -np.abs(group.final - group.initial)

    assert "small_step" in criteria.names()
    criterion = criteria.get(small_step)
    assert criterion.get_config() == {"name": "small_step"}
    assert criteria.get(criterion.get_config()) is criterion
    assert criterion.needs == {"initial", "final"}
    assert criterion.doc == "Keeps the weights that moved least."
    assert prune("small_step", 4) == [1, 1, 0, 1, 1, 0, 0, 0]


def test_a_plain_function_is_given_all_records():
    assert prune(lambda group: np.abs(group.current), 4) == HALF["smallest_weights"]
    assert prune(lambda group: -np.abs(group.initial), 4) == HALF["small_init"]


def test_a_callable_object_has_the_name_of_its_class():
    class Shifted:
        def __call__(self, group):
            return np.abs(group.final) + 1

    assert criteria.get(Shifted()).name == "Shifted"
    assert prune(Shifted(), 4) == HALF["large_final"]


def test_an_unregistered_function_is_not_restored_as_something_else():
    def mine(group):
        return group.final

    with pytest.raises(ValueError, match=r"Unknown criterion 'mine'.*criteria\.register"):
        criteria.get(criteria.get(mine).get_config())

    def large_final(group):
        return group.final

    with pytest.raises(ValueError, match="not the criterion registered under that name"):
        criteria.get(large_final)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown criterion 'large_finale'") as error:
        criteria.get("large_finale")
    assert all(name in str(error.value) for name in criteria.names())


@pytest.mark.parametrize("identifier", [None, 3, {}, {"config": {}}, dict, ["large_final"]])
def test_everything_but_a_criterion_is_an_error_that_quotes_it(identifier):
    with pytest.raises(ValueError, match="Received"):
        criteria.get(identifier)


def test_a_name_is_not_taken_over_by_another_function(registry):
    with pytest.raises(ValueError, match=r"taken by .*criteria\.movement"):
        criteria.register("movement")(lambda group: group.final)
    assert prune("movement", 4) == HALF["movement"]


def test_the_same_function_defined_again_replaces_itself(registry):
    def define(sign):
        @criteria.register("cell", needs="final")
        def cell(group):
            return sign * np.abs(group.final)

    define(1)
    assert prune("cell", 4) == HALF["large_final"]
    define(-1)
    assert prune("cell", 4) == HALF["small_final"]


def test_registration_checks_its_arguments(registry):
    with pytest.raises(ValueError, match=r"needs=\['last'\]"):
        criteria.register("mine", needs={"last"})
    with pytest.raises(ValueError, match="scope='everywhere'"):
        criteria.register("mine", scope="everywhere")
    with pytest.raises(ValueError, match="rounds=0"):
        criteria.register("mine", rounds=0)
    for scope in ("layer", "output", None):
        with pytest.raises(ValueError, match=rf"need scope=.global.*rounds=2, scope={scope!r}"):
            criteria.register("mine", rounds=2, scope=scope)
    assert "mine" not in criteria.names()


@pytest.mark.parametrize("name", [n for n in criteria.names() if criteria.get(n).evidence])
def test_evidence_that_is_missing_names_who_works_it_out(name):
    ones = np.ones((2, 2))
    weights = {"k": selection.Weights(mask=ones > 0, initial=ones, final=ones, current=ones)}
    with pytest.raises(ValueError, match=rf"{name!r} needs the .* 'k', .*update_masks"):
        selection.update(name, weights, rate=0.5)
