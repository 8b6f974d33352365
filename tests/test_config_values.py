"""Values of settings: their types and bounds, and the message for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from clae_dist.config.rules import Rule
from clae_dist.errors import ConfigError
from clae_dist.keys import FIELDS
from clae_dist.recipe import from_yaml, resolve, to_yaml
from tests.test_config import overridden, write

# ---- types ----


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("1E-3", 1e-3), ("4/255", 4 / 255), ("0.5", 0.5), ("1", 1.0), ("3e-4", 3e-4), ("8 / 255", 8 / 255)],
)
def test_numbers_as_papers_write_them(text: str, value: float, tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-3 as a text."""
    assert overridden(f"attack.epsilon={text}").attack.epsilon == value
    assert resolve(write(tmp_path, f"attack:\n  epsilon: {text}\n"))[0].attack.epsilon == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=one", r"seed is 'one' \(command line\); expected an integer"),
        ("seed=1.5", r"seed is 1\.5 .* expected an integer"),
        ("seed=true", r"seed is True .* expected an integer"),
        ("seed=", r"seed is '' .* expected an integer"),
        ("attack.epsilon=big", r"attack\.epsilon is 'big' .* expected a number"),
        ("attack.epsilon=1/0", r"attack\.epsilon is '1/0' .* expected a number"),
        ("attack.epsilon=a/b", r"expected a number"),
        ("attack.epsilon=.nan", r"expected a finite number"),
        ("attack.epsilon=.inf", r"expected a finite number"),
        ("attack.epsilon=true", r"expected a finite number"),
        ("attack.epsilon=[1]", r"expected a finite number"),
        ("attack.clip=1", r"attack\.clip is 1 .* expected true or false"),
        ("attack.clip=maybe", r"expected true or false"),
        ("method.anchor=sam", r"method\.anchor is 'sam' .* one of same, other \(did you mean same\?\)"),
        ("optim.name=adam", r"optim\.name is 'adam' .* one of adamw, sgd, lars \(did you mean adamw\?\)"),
        ("optim.name=[adamw]", r"optim\.name is \['adamw'\] .* one of adamw, sgd, lars"),
        ("model.mean=[0.5, 0.5]", r"model\.mean is \[0\.5, 0\.5\] .* a list of 3 numbers, such as \[0\.5, 0\.5, 0\.5\]"),
        ("model.mean=0.5", r"a list of 3 numbers"),
        ("model.mean=[0.5, x, 0.5]", r"model\.mean\[1\] is 'x' .* expected a number"),
    ],
)
def test_a_value_of_the_wrong_type(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(override)


def test_types_that_fit_without_being_asked() -> None:
    assert overridden("seed=1e3").seed == 1000
    assert overridden("batch.global_size=128.0").batch.global_size == 128
    assert [overridden(f"name={text}").name for text in ("2024", "007", "2026_11", "yes", "'a b'")] == [
        "2024",
        "007",
        "2026_11",
        "yes",
        "a b",
    ]
    assert overridden("run_dir=").run_dir == ""


# ---- values ----


@pytest.mark.parametrize(
    "override",
    [
        "data.image_size=4", "data.streams=-1", "data.shuffle_shards=0", "data.workers=-2",
        "augment.flip=1.5", "augment.jitter=-0.1", "augment.grey=2", "augment.blur=-1",
        "augment.brightness=-1", "augment.contrast=-1", "augment.saturation=-1", "augment.hue=0.6",
        "augment.crop_scale=[0, 1]", "augment.crop_scale=[0.5, 0.2]", "augment.crop_scale=[0.5, 1.2]",
        "augment.crop_ratio=[0, 1]", "augment.blur_sigma=[0, 1]",
        "batch.global_size=1",
        "model.projector_hidden=-1", "model.projector_dim=1", "model.std=[0, 1, 1]",
        "model.adversarial_norm_momentum=0", "model.adversarial_norm_momentum=1.1",
        "objective.temperature=0",
        "attack.epsilon=-1", "method.alpha=-1", "method.start_epoch=-1", "method.every=0", "method.fraction=0",
        "optim.learning_rate=0", "optim.reference_batch=0", "optim.momentum=1", "optim.weight_decay=-1",
        "optim.warmup_epochs=-1", "optim.clip_norm=-1",
        "train.epochs=0", "train.log_every=0", "train.diagnose_every=0",
        "train.knn_every=-1", "train.threads=-1",
        "checkpoint.every_steps=-1", "checkpoint.every_minutes=-1", "checkpoint.keep=0", "checkpoint.keep_every_hours=-1",
        "launch.workers=-1", "launch.max_failures=-1",
        "guard.hang_s=-1", "guard.stop_within_s=0", "guard.max_skipped=-1",
        "evaluation.knn_k=0", "evaluation.knn_bank=0", "evaluation.linear_iterations=0", "evaluation.batch_size=0",
        "evaluation.knn_temperature=0", "evaluation.linear_penalty=-1",
        "name=a/b", "name=''", "name=..", "seed=-1", "seed=9223372036854775808",
    ],
)  # fmt: skip
def test_a_value_out_of_range_names_its_key_and_where_it_was_written(override: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as error:
        overridden(override)
    assert str(error.value).startswith(f"{key} is ")
    assert str(error.value).endswith("[command line]")
    assert ";" in str(error.value), "no way out"
    section, dot, name = key.rpartition(".")
    recipe = write(tmp_path, f"{section}:\n  {name}: {value}\n" if dot else f"{name}: {value}\n")
    with pytest.raises(ConfigError, match=rf"recipe\.yaml:{2 if dot else 1}\]$"):
        resolve(recipe)


def test_every_setting_has_help_and_a_default_within_its_bounds() -> None:
    for key, (field, _) in FIELDS.items():
        if key.partition(".")[0] == "objective":
            continue
        rule = field.metadata["rule"]
        assert len(rule.help) > 5, key
        assert rule.help[0].isupper() or "." in rule.help or ":" in rule.help, key


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule("", ge=0), "0 or more"),
        (Rule("", ge=0, zero="automatic"), "0 (automatic) or more"),
        (Rule("", ge=2), "at least 2"),
        (Rule("", gt=0), "positive"),
        (Rule("", ge=0, le=1), "0 to 1"),
        (Rule("", ge=0, lt=1), "0 or more and below 1"),
        (Rule("", gt=0, le=1), "above 0 and at most 1"),
        (Rule("", lt=2), "below 2"),
        (Rule(""), ""),
    ],
)
def test_bounds_in_words(rule: Rule, words: str) -> None:
    assert rule.bounds() == words


def test_nan_is_outside_any_bounds() -> None:
    """A comparison that is written the wrong way round lets NaN through."""
    assert not any(Rule("", **{name: 1.0}).allows(float("nan")) for name in ("ge", "gt", "le", "lt"))


@pytest.mark.parametrize("written", ["[a]", "{a: b}"])
def test_a_text_in_a_recipe_is_a_text(tmp_path: Path, written: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"tracking:\n  uri: {written}\n")
    with pytest.raises(ConfigError, match="tracking"):
        resolve(tmp_path / "recipe.yaml")


def test_a_text_on_the_command_line_is_taken_as_it_is() -> None:
    """YAML cut a path at " #" and made a mapping of "a: b"."""
    for text in ("/tmp/my #1/x", "a: b", "[1", "/tmp/a:"):
        assert resolve(None, [f"data.shards={text}"])[0].data.shards == text
    assert resolve(None, ["data.shards=null"])[0].data.shards == ""


# ---- mappings ----


def test_a_mapping_is_one_value(tmp_path: Path) -> None:
    recipe = write(tmp_path, "data:\n  mixture:\n    /data/a.b: 0.25\n    s3://bucket/x: 1/8\n  image_size: 32\n")
    config, origins = resolve(recipe)
    assert config.data.mixture == {"/data/a.b": 0.25, "s3://bucket/x": 0.125}
    assert config.data.image_size == 32
    assert origins["data.mixture"] == f"{recipe}:2"
    assert resolve(recipe, ["data.mixture={/other: 0.5}"])[0].data.mixture == {"/other": 0.5}
    assert from_yaml(write(tmp_path, to_yaml(config), "resolved.yaml")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.mixture=0.5", r"data\.mixture is 0\.5 \(command line\); expected a mapping with a space after each colon"),
        ("data.mixture={/more:0.25}", r"expected a mapping with a space after each colon, such as \{/data/more: 0\.25\}"),
        ("data.mixture={a: many}", r"data\.mixture\[a\] is 'many' \(command line\); expected a number"),
        ("data.mixture={a: 1.5}", r"data\.mixture is \[1\.5\]; use a number above 0 and below 1; .* \[command line\]"),
        ("data.mixture={a: 0.5, b: 0.5}", r"the shares leave 0 for data\.shards; use shares below 1 in total"),
    ],
)
def test_what_is_no_mixture(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(override)
