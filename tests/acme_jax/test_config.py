import dataclasses
import inspect
import json

import pytest

from acme_jax import presets
from acme_jax.config import Config, ConfigError, FleetConfig, ModelConfig, TrainConfig, from_dict


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_survives_json(name):
    config = presets.get(name)
    again = from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert config.preset == name


def test_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match=r"unknown preset 'mnist'; expected one of mnist5k, dig"):
        presets.get("mnist")


def test_unknown_key_is_named_with_its_section():
    plain = Config().to_dict()
    plain["search"]["populaton_size"] = 4
    with pytest.raises(ConfigError, match=r"search\.populaton_size; known keys here: population_"):
        from_dict(plain)


def test_section_that_is_no_mapping():
    with pytest.raises(ConfigError, match="configuration section search must be a mapping, got 3"):
        from_dict({"search": 3})


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "name", "cifar", r"DataConfig\.name is 'cifar'; expected one of mnist5k, digits"),
        ("data", "public_test", 0, r"DataConfig\.public_test must be positive, got 0"),
        ("model", "num_heads", 5, r"embed_dim \(64\) must be a multiple of num_heads \(5\)"),
        ("search", "population_size", 7, "population_size must be even, got 7"),
        ("search", "rule", "best", r"SearchConfig\.rule is 'best'; expected one of paper"),
        ("fleet", "budgets", [], "budgets is empty"),
        ("fleet", "budgets", [0.5, -1.0], "budgets must be positive fractions"),
        ("fleet", "budget_spread", -0.1, "budget_spread must not be negative"),
        ("fleet", "test_fraction", 1.0, r"test_fraction must be in \(0, 1\), got 1.0"),
        ("header", "proxy_fraction", 0.0, r"proxy_fraction must be in \(0, 1\], got 0.0"),
        ("refine", "momentum", 1.0, r"RefineConfig\.momentum must be in \[0, 1\), got 1.0"),
        ("refine", "prune_per_round", -1, "prune_per_round must not be negative"),
        ("reference", "learning_rate", float("nan"), "learning_rate must be positive, got nan"),
        ("compute", "client_chunk", 0, "client_chunk must be positive, got 0"),
        ("compute", "compilation_cache", "", "compilation_cache is empty; give a directory"),
    ],
)
def test_bad_values(section, key, value, message):
    with pytest.raises(ConfigError, match=message):
        from_dict({section: {key: value}})


def test_negative_seed():
    with pytest.raises(ConfigError, match=r"Config\.seed must not be negative, got -1"):
        Config(seed=-1)


def test_fingerprint_follows_what_changes_results_and_nothing_else():
    config = Config()
    changed = [
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, model=ModelConfig(num_layers=5)),
        dataclasses.replace(config, reference=TrainConfig(epochs=3)),
        dataclasses.replace(config, fleet=FleetConfig(budgets=(0.3, 0.55))),
    ]
    prints = {c.fingerprint() for c in [config, *changed]}
    assert len(prints) == 1 + len(changed)
    layout = dataclasses.replace(
        config.compute, num_devices=1, client_chunk=4, compilation_cache="programs"
    )
    assert dataclasses.replace(config, compute=layout).fingerprint() == config.fingerprint()


def test_every_preset_is_registered_under_its_name():
    made = {
        name
        for name, value in vars(presets).items()
        if inspect.isfunction(value)
        and value.__module__ == presets.__name__
        and value.__annotations__.get("return") == "Config"
        and name != "get"
    }
    assert made == set(presets.PRESETS)
    for name, make in presets.PRESETS.items():
        assert make().preset == name
