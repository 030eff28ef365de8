"The presets that repeat published recipes carry the published numbers, or say why not."

from pathlib import Path

import pytest
import yaml

from ebt_nb.config.kinds import config_fields
from ebt_nb.config.overrides import build_config, override_config

TABLE = yaml.safe_load(Path(__file__).with_name("published_recipes.yaml").read_text())


def value_of(config, key):
    section, name = key.split(".")
    return config.sections[section].model_dump()[name]


def is_same(value, published):
    if isinstance(published, bool) or not isinstance(published, (int, float)):
        return value == (tuple(published) if isinstance(published, list) else published)
    return value == pytest.approx(published, rel=1e-9)


@pytest.mark.parametrize("name", TABLE["presets"])
def test_a_preset_has_the_published_numbers(name):
    config = build_config(name)
    for key, row in TABLE["presets"][name].items():
        assert row.keys() >= {"published", "source"} and ("here" in row) == ("why" in row), key
        value = value_of(config, key)
        assert is_same(value, row.get("here", row["published"])), f"{name}: {key} is {value}"
        if "here" in row:  # the published way is a setting away
            assert is_same(value_of(override_config(config, {key: row["published"]}), key), row["published"]), key


def test_the_table_covers_every_number_of_a_recipe():
    "A key of these sections that acts and differs from its default stands in the table."
    sections = ("thinking", "objective", "optim", "diffusion", "encoder")
    for name, rows in TABLE["presets"].items():
        config = build_config(name)
        is_fixed = config.is_energy_model and not config.thinking.learn_step_size
        idle = {"optim.step_size_lr_multiplier"} if is_fixed else set()
        for key, field in config_fields(config).items():
            if key.split(".")[0] in sections and key not in rows.keys() | idle:
                assert value_of(config, key) == field.get_default(call_default_factory=True), f"{name}: {key}"


def test_every_difference_without_a_key_has_a_reason():
    for row in TABLE["without_key"]:
        assert row.keys() == {"what", "published", "here", "why"} and all(row.values())
