"What a user types is what the run gets: overrides, YAML files, notebook parameters, names and texts, drawn at random."

import json
import math
import shlex
import string
import subprocess

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from ebt_nb.cli.commands import capture_command
from ebt_nb.cli.main import COMMAND_MODULES
from ebt_nb.cli.presets import annotated_yaml
from ebt_nb.config.errors import ConfigError, WorkbenchError
from ebt_nb.config.kinds import RUN_KINDS, config_fields, section_fields
from ebt_nb.config.overrides import (
    build_config,
    convert_text,
    convert_yaml,
    field_type,
    format_value,
    load_config,
    load_defaults,
    load_yaml,
    override_config,
    parse_overrides,
)
from ebt_nb.config.validation import validate_config
from ebt_nb.jobs.launch import override_arguments
from ebt_nb.jobs.notebook_parameters import NotebookError, Parameter, convert_parameter, split_settings
from ebt_nb.jobs.sweep_file import format_settings, read_sweep
from ebt_nb.runs.files import format_json

assert COMMAND_MODULES  # importing them has registered all commands
PLAIN_WORDS = ["001", "1e3", "null", "2024-01-01", "yes", "off", "my #1 wish", "Answer: yes", "'a'", '"b"', "~", "2025"]
TEXT_KEYS = ("generation.prompt", "data.source", "data.text_column", "trainer.accelerator")
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30) | st.sampled_from(PLAIN_WORDS)
typed_texts = texts.filter(lambda text: "\0" not in text)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(PLAIN_WORDS) | st.text(max_size=20)
trees = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
)
keys = st.sampled_from(sorted(config_fields())) | st.text(string.ascii_lowercase + "._", max_size=12)
QUICKSTART = build_config("text/quickstart")


def value_of(config, key):
    section, name = key.split(".")
    return getattr(config.sections[section], name)


@given(st.sampled_from(TEXT_KEYS), typed_texts)
def test_a_text_stays_as_typed(key, text):
    config = override_config(QUICKSTART, [f"{key}={text}"])
    assert value_of(config, key) == text
    assert validate_config(yaml.safe_load(config.to_yaml())) == config
    assert validate_config(yaml.safe_load(annotated_yaml(config))) == config
    again = override_arguments(QUICKSTART, config)
    assert override_config(QUICKSTART, again[1::2]) == config


@given(st.lists(texts.filter(bool), max_size=4))
def test_stop_texts_stay_as_typed(stop):
    config = override_config(QUICKSTART, [f"generation.stop={format_value(stop)}"])
    assert config.generation.stop == stop
    assert override_config(QUICKSTART, override_arguments(QUICKSTART, config)[1::2]) == config


@given(keys, scalars | st.lists(scalars, max_size=3))
@example("optim.peak_lr", math.nan)
@example("trainer.max_steps", 10**400)
@example("run.seed", True)
@example("data.tokenizer", "\0")
def test_any_override_is_taken_or_refused(key, value):
    "No traceback; and what is taken is what was typed, read back from what the run saves."
    item = f"{key}={format_value(value)}"
    try:
        config = override_config(QUICKSTART, [item])
    except WorkbenchError as error:
        assert key.strip() in str(error) or key.split(".")[0] in str(error)
        return
    assert validate_config(yaml.safe_load(config.to_yaml())) == config
    if isinstance(value, str) and field_type(key) is str:
        assert value_of(config, key) == value


@given(trees)
def test_any_yaml_tree_is_taken_or_refused(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "config.yaml"
    for content in (tree, {"format": 2, "run": tree}, {"format": 2, "trainer": {"max_steps": tree}, "data": tree}):
        path.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        for read in (load_config, load_defaults, read_sweep):
            try:
                read(path)
            except WorkbenchError as error:
                assert str(path) in str(error)


@given(st.text(max_size=60) | st.text("[]{}&*a:#- \n'\"!|>%@", max_size=60))
@example("&a [*a]")
@example("run: &a {name: *a}")
@example("[" * 5000)
@example("run: {name: 2024-13-45}")
@example("? [a]\n: b")
@example("!!python/object:os.system x")
@example("!!int 'a'")
def test_any_text_of_a_file_is_taken_or_refused(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("text") / "config.yaml"
    path.write_text(text, encoding="utf-8", errors="replace", newline="")
    for read in (load_config, load_defaults, read_sweep):
        try:
            read(path)
        except WorkbenchError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize("key", TEXT_KEYS)
@pytest.mark.parametrize("word", ["001", "1e3", "2024-01-01", "yes", "0x10", "1:30", ".5"])
def test_an_unquoted_text_in_a_file_stays_as_written(tmp_path, key, word):
    section, name = key.split(".")
    path = tmp_path / "config.yaml"
    path.write_text(f"{section}: {{{name}: {word}}}\n")
    assert value_of(load_config(path), key) == word
    assert load_defaults(path)[key] == word
    path.write_text(f"{section}: {{{name}: null}}\n")
    for read in (load_config, load_defaults):
        with pytest.raises(ConfigError, match=rf"{key}: null is no value for it.*quotes"):
            read(path)


def test_a_number_is_written_alike_everywhere(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("trainer: {max_steps: 1e1, val_every: 010}\noptim: {peak_lr: 1e-3, betas: [0.9, 9.5e-1]}\n")
    config = load_config(path)
    typed = ["trainer.max_steps=1e1", "trainer.val_every=010", "optim.peak_lr=1e-3", "optim.betas=[0.9, 9.5e-1]"]
    assert override_config(config, typed) == config
    assert (config.trainer.max_steps, config.trainer.val_every, config.optim.betas) == (10, 10, (0.9, 0.95))
    for item in ("trainer.max_steps=yes", "run.seed=true", "trainer.max_steps=1:30", "optim.peak_lr=inf"):
        with pytest.raises(ConfigError, match=item.split("=")[0]):
            override_config(config, [item])


def test_a_section_or_key_given_twice_is_refused(tmp_path):
    path = tmp_path / "twice.yaml"
    for text, line in [("run: {}\nrun: {}\n", 2), ("run:\n  seed: 1\n  seed: 2\n", 3), ("a: [{b: 1, 'b': 2}]\n", 1)]:
        path.write_text(text)
        for read in (load_config, load_defaults, read_sweep):
            with pytest.raises(ConfigError, match=rf"twice.yaml: line {line}: \w+ is given twice"):
                read(path)


def test_all_kinds_of_runs_agree_on_what_is_text():
    "A typed value is read before the kind of run is known."
    for config_class in RUN_KINDS.values():
        for key, field in section_fields(config_class).items():
            for word in ("1e1", "true", "null", "[1]"):
                assert type(convert_text(word, field.annotation)) is type(convert_text(word, field_type(key))), key


@given(st.one_of(typed_texts, st.sampled_from(PLAIN_WORDS)))
def test_a_text_parameter_of_a_notebook_stays_as_typed(text):
    declared = {"greeting": Parameter("hello"), "title": Parameter(None, "str | None"), "words": Parameter(["a"])}
    parameters, _ = split_settings([f"greeting={text}", f"words={format_value([text])}"], declared, "job")
    assert parameters == {"greeting": text, "words": [text]}
    if text != "null":
        assert split_settings([f"title={text}"], declared, "job")[0] == {"title": text}


@given(st.text(max_size=20), st.sampled_from([1, 0.5, True, [], {}, None, ["a"]]))
def test_any_parameter_of_a_notebook_is_taken_or_refused(text, default):
    try:
        value = convert_parameter("a", text, Parameter(default))
    except NotebookError as error:
        assert str(error).startswith("a: expects")
    else:
        assert default is None or value is None or isinstance(value, type(default))


@given(st.dictionaries(st.sampled_from(TEXT_KEYS), typed_texts, min_size=1))
def test_settings_in_a_line_are_read_back_by_bash(values):
    line = format_settings(values)
    assert len(line.splitlines()) == 1
    if all(text.isprintable() for text in values.values()):
        assert parse_overrides(shlex.split(line)) == values


def test_unprintable_settings_are_read_back_by_bash():
    values = {"generation.prompt": "a\nb\t'c' \\ \x1b", "data.source": "\u2028"}
    printed = subprocess.run(["bash", "-c", f"printf '%s\\0' {format_settings(values)}"], capture_output=True).stdout
    assert parse_overrides(printed.decode().split("\0")[:-1]) == values


@given(st.text(max_size=20) | st.text("./~:= -ab\n", max_size=12))
def test_any_name_of_a_run_is_taken_or_refused(name):
    try:
        config = override_config(QUICKSTART, {"run.name": name})
    except ConfigError as error:
        assert "run.name" in str(error)
    else:
        assert config.run.name == name and not name.startswith("/")


@given(typed_texts | st.text("./~:= -ab0", max_size=12))
@example("~nobody/x")
@example("a" * 5000)
def test_any_address_is_found_or_refused(tmp_path_factory, address):
    if address.startswith("wdb:"):  # asks the server
        return
    runs = tmp_path_factory.mktemp("runs")
    for words in (["runs", "show"], ["resume"], ["generate"]):
        code, out, err = capture_command(*words, "--runs-dir", str(runs), address)
        ends_options = address == "--" and words == ["generate"]  # no address: the model of the package
        assert code == (0 if address == "-h" or ends_options else 2) and (err or out), address
    assert not list(runs.iterdir())


@given(trees)
def test_json_is_strict(tree):
    def refuse(word):
        raise AssertionError(word)

    json.loads(format_json(tree), parse_constant=refuse)


@given(st.lists(typed_texts.filter(lambda text: not text.startswith("-")), max_size=3))
def test_any_words_of_a_command_are_taken_or_refused(words):
    for command in ("train", "presets"):
        code, _, err = capture_command(command, "--preset" if command == "train" else "--size", "none", *words)
        assert code == 2 and err


def test_yaml_values_of_a_list_keep_their_own_types():
    assert convert_yaml(load_yaml("[1, '1', 1e3, no, null]"), list[str]) == ["1", "1", "1e3", "no", None]
