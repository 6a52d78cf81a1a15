"""The common rules for names, configurations, functions and identity of all registered kinds."""

import dataclasses
import json

import keras
import pytest

from lottery_ticket_pruner import criteria, distributions, schedules, structures, treatments

KINDS = {
    "criterion": (criteria.get, criteria.register, criteria.names),
    "structure": (structures.get, structures.register, structures.names),
    "distribution": (distributions.get, distributions.register, distributions.names),
    "schedule": (schedules.get, schedules.register, schedules.names),
    "kept": (treatments.get_kept, treatments.register_kept, treatments.kept_names),
    "pruned": (treatments.get_pruned, treatments.register_pruned, treatments.pruned_names),
}
# Identifiers of each kind, without and with arguments.
BUILT_IN = {
    "criterion": criteria.names() + criteria.channel_names(),
    "structure": ["2:4", "4x1", "filters", "channels", structures.Blocks((2, 3), "max")],
    "distribution": ["uniform", "erk", distributions.Distribution("erk", dense_first=True)],
    "schedule": [
        0.5,
        schedules.Polynomial(0.1, 0.9, 2, 12, power=2, frequency=5),
        schedules.Geometric(0.0, 0.5, 0, 10),
    ],
    "kept": treatments.kept_names(),
    "pruned": treatments.pruned_names(),
}
EACH = [(kind, made) for kind, all_made in BUILT_IN.items() for made in all_made]
kinds = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.once


# Where each registry is: the module, and the name in it.
PLACES = {
    "criterion": (criteria, "_REGISTRY"),
    "structure": (structures, "_REGISTRY"),
    "distribution": (distributions, "_RULES"),
    "schedule": (schedules, "_REGISTRY"),
    "kept": (treatments, "_KEPT"),
    "pruned": (treatments, "_PRUNED"),
}


def registries():
    """Returns the registry of each kind."""
    return {kind: getattr(module, name) for kind, (module, name) in PLACES.items()}


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch):
    for module, name in PLACES.values():
        monkeypatch.setattr(module, name, getattr(module, name).copy())


def named(name):
    """Returns a function with this name, as users write it for this kind."""

    def function(*args):
        return None

    function.__name__ = function.__qualname__ = name
    return function


def same(one, other):
    return type(one) is type(other) and one.get_config() == other.get_config()


@pytest.mark.parametrize(("kind", "made"), EACH, ids=str)
def test_built_in_objects_round_trip_through_their_configuration_and_through_keras(kind, made):
    get = KINDS[kind][0]
    one = get(made)
    assert same(get(one.get_config()), one)
    assert same(type(one).from_config(one.get_config()), one)
    form = keras.saving.serialize_keras_object(one)
    for config in (form, json.loads(json.dumps(form))):
        assert same(get(config), one)
        assert same(keras.saving.deserialize_keras_object(config), one)
    if kind != "schedule":
        assert get(form) == one
        assert hash(get(form)) == hash(one)


def test_all_that_is_registered_by_the_library_is_tested_above():
    tested = {
        (kind, KINDS[kind][0](made).get_config()["name"])
        for kind, all_made in BUILT_IN.items()
        for made in all_made
    }
    registered = {
        (kind, name)
        for kind, registry in registries().items()
        for name, thing in registry.items()
        if thing.__module__.startswith("lottery_ticket_pruner.")
    }
    assert tested == registered


@kinds
def test_a_registered_function_round_trips_through_keras(kind):
    get, register, _ = KINDS[kind]
    mine = register("of_mine")(named("mine"))
    for identifier in ("of_mine", mine, keras.saving.serialize_keras_object(mine)):
        one = get(identifier)
        assert one.get_config()["name"] == "of_mine"
        form = json.loads(json.dumps(keras.saving.serialize_keras_object(one)))
        for again in (get(form), keras.saving.deserialize_keras_object(form)):
            assert same(again, one)
            assert getattr(again, "rule", None) or again.function is mine


@kinds
def test_a_function_that_is_named_like_another_is_refused_in_every_form(kind):
    get, register, names = KINDS[kind]
    for name in names():
        mine = named(name)
        with pytest.raises(ValueError, match=f"named '{name}' is not the .*Rename"):
            get(mine)
        with pytest.raises(ValueError, match="contains only its name"):
            get(keras.saving.serialize_keras_object(mine))
        with pytest.raises(ValueError, match=f"name '{name}' is taken by"):
            register(name)(mine)
        register(f"own_{name}")(mine)
        assert get(get(mine).get_config()) == get(mine) or kind == "schedule"
        assert get(mine).get_config()["name"] == f"own_{name}"


@kinds
def test_a_function_replaced_under_its_name_has_no_configuration(kind):
    get, register, _ = KINDS[kind]
    made = get(named("mine"))
    assert made.get_config()["name"] == "mine"
    with pytest.raises(ValueError, match="Unknown"):
        get(made.get_config())
    register("mine")(named("mine"))
    with pytest.raises(ValueError, match="registered again since"):
        made.get_config()


@kinds
@pytest.mark.parametrize("identifier", [None, 3j, dict, ["a"], {"config": 3}, {}, {"config": {}}])
def test_errors_quote_invalid_identifiers(kind, identifier):
    with pytest.raises(ValueError, match=r"Received"):
        KINDS[kind][0](identifier)


@kinds
def test_arguments_that_do_not_fit_are_refused(kind):
    get, _, names = KINDS[kind]
    with pytest.raises(ValueError, match="cannot be created from the arguments"):
        get({"name": names()[0], "colour": "red"})


@pytest.mark.parametrize("name", ["2:4", "4x1", "filters", "units"])
def test_names_with_arguments_in_them_are_taken(name):
    with pytest.raises(ValueError, match="is taken"):
        structures.register(name)(named("mine"))
    with pytest.raises(ValueError, match="Rename"):
        structures.get(named(name))


@pytest.mark.parametrize(
    ("module", "base"), [(structures, "Structure"), (schedules, "Schedule")], ids=str
)
def test_a_class_that_is_not_registered_stays_itself(module, base):
    class Mine(getattr(module, base)):
        def __init__(self):
            pass

        def get_config(self):
            return {"name": "Mine"}

    assert type(Mine.from_config(Mine().get_config())) is Mine
    with pytest.raises(ValueError, match="Unknown"):
        module.get(Mine().get_config())


def test_a_class_makes_only_itself_or_what_is_registered():
    @dataclasses.dataclass(frozen=True)
    class Mine(structures.Outputs):
        pass

    config = json.loads('{"name": "Mine", "pooling": "max"}')
    assert Mine.from_config(config) == Mine("max")
    assert structures.Outputs.from_config({"name": "2:4"}).name == "n_of_m"
    for name in ("Mine", "stripes"):
        with pytest.raises(ValueError, match=f"Unknown structure '{name}'"):
            structures.Outputs.from_config({"name": name})


def test_a_class_named_like_a_schedule_is_not_taken_for_it():
    class polynomial(schedules.Polynomial):  # noqa: N801
        name = "polynomial"

    with pytest.raises(ValueError, match="Rename"):
        polynomial(0.0, 0.5, 0, 10).get_config()


def test_treatments_know_which_weights_they_are_for():
    with pytest.raises(ValueError, match=r"of kept weights. Received: 'zero'"):
        treatments.get_kept(treatments.get_pruned("zero"))
    with pytest.raises(ValueError, match="cannot be created"):
        treatments.get_kept({"name": "rewind", "weights": "pruned"})
    treatments.register_pruned("rewind")(named("mine"))
    assert treatments.get_pruned("rewind") != treatments.get_kept("rewind")
    with pytest.raises(ValueError, match='Add "weights"'):
        treatments.Treatment.from_config({"name": "rewind"})
