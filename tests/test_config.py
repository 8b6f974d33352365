"""Config: what a user can write, and what every mistake says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from clae_dist.config import Config
from clae_dist.errors import ConfigError
from clae_dist.keys import FIELDS, flatten, shapes_result
from clae_dist.recipe import build, from_yaml, parse_overrides, recipe_names, resolve, to_yaml

RECIPES = [Path(__file__).parents[1] / "configs" / f"{name}.yaml" for name in recipe_names()]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def overridden(*overrides: str) -> Config:
    return build(parse_overrides(list(overrides)))


# ---- where values come from ----


def test_defaults_need_no_recipe() -> None:
    config, origins = resolve(None)
    assert config == Config()
    assert set(origins.values()) == {"default"}
    assert set(origins) == set(FIELDS)


def test_every_value_knows_where_it_was_written(tmp_path: Path) -> None:
    write(tmp_path, "batch:\n  global_size: 512\nseed: 1\n", "base.yaml")
    recipe = write(tmp_path, "extends: base.yaml\nseed: 2\nmethod:\n  alpha: 0.5\n")
    config, origins = resolve(recipe, ["method.alpha=0.25"])
    assert (config.batch.global_size, config.seed, config.method.alpha) == (512, 2, 0.25)
    assert origins["batch.global_size"] == f"{tmp_path / 'base.yaml'}:2"
    assert origins["seed"] == f"{recipe}:2"
    assert origins["method.alpha"] == "command line"
    assert origins["model.encoder"] == "default"


def test_extends_loses_to_the_file_itself_wherever_it_stands(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\nname: base\n", "base.yaml")
    config, _ = resolve(write(tmp_path, "seed: 2\nextends: base.yaml\n"))
    assert (config.seed, config.name) == (2, "base")


def test_recipes_that_extend_each_other_are_named(tmp_path: Path) -> None:
    """Endless recursion, once."""
    write(tmp_path, "extends: b.yaml\n", "a.yaml")
    write(tmp_path, "extends: a.yaml\n", "b.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml.*b\.yaml.*a\.yaml.* extends itself"):
        resolve(tmp_path / "a.yaml")


def test_a_recipe_that_is_extended_and_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read"):
        resolve(write(tmp_path, "extends: nowhere.yaml\n"))


def test_texts_in_a_recipe_stay_as_they_were_written(tmp_path: Path) -> None:
    """run_dir: 2026_11 was the number 202611, once."""
    config, _ = resolve(write(tmp_path, "name: 007\nrun_dir: 2026_11\ndata:\n  shards:\n  train_split: yes\n"))
    assert (config.name, config.run_dir, config.data.shards, config.data.train_split) == ("007", "2026_11", "", "yes")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ConfigError, match="cannot be read .byte 0 is not UTF-8.; name a recipe"):
        resolve(tmp_path / "recipe.yaml")


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert resolve(write(tmp_path, "# nothing\n"))[0] == Config()


def test_an_override_with_an_equals_sign_in_its_value() -> None:
    assert overridden("tracking.uri=http://host/?a=b").tracking.uri == "http://host/?a=b"


# ---- mistakes in keys ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "batch:\n  global_sise: 4\n",
            r"batch\.global_sise \(.*recipe\.yaml:2\) is not a known key; did you mean batch\.global_size\?",
        ),
        ("optim:\n  alpha: 1\n", r"optim\.alpha .* is not a known key; did you mean method\.alpha\?"),
        ("epsilon: 0.1\n", r"epsilon .* is not a known key; did you mean attack\.epsilon\?"),
        ("zzzqqq: 1\n", r"zzzqqq .* is not a known key; `clae config CONFIG` lists the known ones"),
        ("attack: 3\n", r"attack \(.*:1\) is a section; set one of its keys: attack\.name, attack\.norm"),
        ("attack:\n", r"attack \(.*:1\) is a section"),
        ("seed:\n  more: 1\n", r"seed\.more .* is not a known key; did you mean seed\?"),
        ("seed: 1\nseed: 2\n", r"seed is set twice in .*recipe\.yaml:1 and .*recipe\.yaml:2\); keep one"),
        ("batch:\n  global_size: 4\nseed: 0\nbatch:\n  global_size: 8\n", r"batch is a section twice .*:1 and .*:4"),
        ("extends: a.yaml\nextends: b.yaml\n", r"extends is set twice"),
        ("- 1\n", r"is not a mapping"),
        ("a: [1\n", r"is not valid YAML"),
        ("a: *b\n", r"is not valid YAML"),
        ("seed: !!python/name:os.system\n", r"seed \(.*:1\) cannot be read .*write a plain value"),
        ("seed: !!int abc\n", r"seed \(.*:1\) cannot be read"),
        ("seed: \x07\n", r"is not valid YAML"),
    ],
)
def test_a_key_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "", "a.yaml")
    write(tmp_path, "", "b.yaml")
    with pytest.raises(ConfigError, match=message):
        resolve(write(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.global_siz=4", r"batch\.global_siz \(command line\) is not a known key; did you mean batch\.global_size\?"),
        ("batch.global_size", r"'batch\.global_size' is not an override; write section\.key=value"),
        ("batch=4", r"batch \(command line\) is a section; set one of its keys: batch\.global_size"),
        ("data.image_size=[1", r"data\.image_size is '\[1' \(command line\), which is not valid YAML; quote it"),
    ],
)
def test_an_override_that_cannot_be_used(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overridden(override)


def test_a_recipe_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"'nothing\.yaml', which is neither a file nor the name of a recipe; use the path"):
        resolve("nothing.yaml")


@pytest.mark.parametrize("world_size", [8, 32, 512])
def test_imagenets_recipes_train_on_many_ranks(world_size: int) -> None:
    for name in ("simclr", "clae", "clae-original", "simclr-vit-s", "clae-vit-s"):
        assert resolve(f"imagenet/{name}").config.rows_per_rank(world_size) == 4096 // world_size
    assert resolve("imagenet/clae").config.learning_rate() == pytest.approx(4.8)  # that of SimCLR's code
    assert resolve("imagenet/clae-vit-s").config.learning_rate() == pytest.approx(2.4e-3)


def test_a_recipe_of_the_package_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any folder; a file of that name takes precedence."""
    monkeypatch.chdir(tmp_path)
    assert {"quickstart", "cifar10/clae", "imagenet/simclr"} <= set(recipe_names())
    for name in recipe_names():
        assert resolve(name)[0].name
    assert resolve("quickstart")[1]["batch.global_size"].endswith("recipes/quickstart.yaml:13")
    (tmp_path / "quickstart").mkdir()
    assert resolve("quickstart")[0].name == "quickstart"
    (tmp_path / "quickstart").rmdir()
    write(tmp_path, "seed: 5\n", "quickstart")
    assert resolve("quickstart")[0] == Config(seed=5)
    with pytest.raises(ConfigError, match=r"'cifar10/claa\.yaml', .*\(did you mean cifar10/clae\?\); .* one of cifar10/acl, "):
        resolve("cifar10/claa.yaml")


def test_values_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"data\.streams is 7, which does not divide batch\.global_size 256; try 8"):
        overridden("data.streams=7")
    with pytest.raises(ConfigError, match=r"optim\.warmup_epochs is 10, but train\.epochs is 5; warm up for a part"):
        overridden("train.epochs=5")
    assert overridden("train.epochs=0.5", "optim.warmup_epochs=0").train.epochs == 0.5


# ---- what is derived ----


def test_rows_per_rank() -> None:
    assert [overridden("batch.global_size=256").rows_per_rank(world) for world in (1, 2, 4, 8)] == [256, 128, 64, 32]
    with pytest.raises(ConfigError, match=r"batch\.global_size is 1000, but 48 ranks need equal rows; try 960 or 1008"):
        overridden("batch.global_size=1000").rows_per_rank(48)
    with pytest.raises(ConfigError, match=r"batch\.global_size is 4, but 8 ranks need equal rows; try 8"):
        overridden("batch.global_size=4").rows_per_rank(8)
    with pytest.raises(ConfigError, match=r"data\.streams is 4, which 8 ranks cannot share equally; try data\.streams=8"):
        overridden("batch.global_size=16", "data.streams=4").rows_per_rank(8)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_way_out_for_streams_is_one(world_size: int) -> None:
    """Every number of streams that an error proposes must work."""
    for streams in (1, 2, 3, 4, 6, 8, 12, 24):
        config = overridden("batch.global_size=24", f"data.streams={streams}")
        try:
            assert config.rows_per_rank(world_size) == 24 // world_size
        except ConfigError as error:
            proposed = str(error).split("data.streams=")[1].rstrip(".")
            assert overridden("batch.global_size=24", f"data.streams={proposed}").rows_per_rank(world_size)


@pytest.mark.parametrize(("scaling", "rate"), [("linear", 1.2), ("sqrt", 0.6), ("none", 0.3)])
def test_learning_rate_scaling(scaling: str, rate: float) -> None:
    config = overridden("batch.global_size=1024", f"optim.scaling={scaling}")
    assert config.learning_rate() == pytest.approx(rate, rel=1e-12)  # one multiplication in float64


def test_only_what_cannot_change_the_result_may_differ_in_a_continued_run() -> None:
    free = {key for key in FIELDS if not shapes_result(key)}
    assert {"data.workers", "train.log_every", "tracking.name", "run_dir", "launch.launcher"} <= free
    assert not free & {"seed", "batch.global_size", "attack.epsilon", "optim.learning_rate", "data.streams", "train.epochs"}


# ---- to YAML and back ----


@pytest.mark.parametrize("recipe", [None, *RECIPES], ids=lambda path: "defaults" if path is None else path.stem)
def test_to_yaml_and_back_is_the_same_config(recipe: Path | None, tmp_path: Path) -> None:
    config, origins = resolve(recipe)
    assert from_yaml(write(tmp_path, to_yaml(config))) == config
    assert from_yaml(write(tmp_path, to_yaml(config, comments=origins))) == config


def test_texts_that_yaml_would_read_as_something_else_survive(tmp_path: Path) -> None:
    config = Config(name="007", run_dir="a: b # 'c'", attack=dataclasses.replace(Config().attack, epsilon=1e-300))
    data = dataclasses.replace(config.data, shards="null", train_split="yes", test_split="1e3")
    config = dataclasses.replace(config, data=data)
    assert from_yaml(write(tmp_path, to_yaml(config))) == config


def test_flatten_names_every_field_once() -> None:
    assert list(flatten(Config())) == list(FIELDS)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # type: ignore[misc]


# ---- the keys of methods ----


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.alpha=1", r"attack\.alpha \(command line\) is no longer a key; use method\.alpha\."),
        ("attack.start_epoch=1", r"use method\.start_epoch\."),
        ("attack.cost=fused", r"attack\.cost .* is no longer a key; use method\.cost .*, or method\.name=clae_fused"),
        ("attack.name=none", r"attack\.name is 'none' .* use method\.name=simclr\."),
        ("attack.name=null", r"attack\.name is 'none' .* use method\.name=simclr\."),
        ("method.alpa=1", r"is not a key of method\.name=clae, .*; did you mean method\.alpha\?"),
        ("method.name=byol", r"expected one of acl, .*clae, clae_fused, .*simclr, .*or package\.module:Class"),
        ("method.name=no.such:Thing", r"cannot be imported"),
        ("method.name=os.path:join", r"is not a subclass of"),
    ],
)
def test_keys_that_have_moved_or_that_the_method_does_not_have(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        overridden(override)
    assert "\n" not in str(error.value)
    key, _, value = override.partition("=")
    section, _, name = key.partition(".")
    with pytest.raises(ConfigError, match=message.replace(r"\(command line\)", ".*")):
        resolve(write(tmp_path, f"{section}:\n  {name}: {value}\n"))


def test_a_method_has_its_own_keys_alone() -> None:
    with pytest.raises(ConfigError, match=r"method\.alpha .* is not a key of method\.name=simclr, which has no keys"):
        resolve(None, ["method.name=simclr", "method.alpha=2"])
    config, origins = resolve(None, ["method.name=clae_fused", "method.every=2"])
    assert dataclasses.asdict(config.method) == {
        "name": "clae_fused",
        "alpha": 1.0,
        "start_epoch": 0.0,
        "every": 2,
        "fraction": 1.0,
    }
    assert origins["method.every"] == "command line"
    for refused in ("attack.name=pgd", "attack.random_start=true", "attack.statistics=updated"):
        with pytest.raises(ConfigError, match="method.name=clae_fused"):
            resolve(None, ["method.name=clae_fused", refused])


def test_reading_settings_imports_no_torch() -> None:
    code = "import sys, clae_dist.recipe as r; r.resolve(None, ['method.name=clae_fused']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
