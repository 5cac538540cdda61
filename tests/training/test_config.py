"""Run configurations: what is read comes back, and every complaint names its key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrdfast.errors import InputError
from xrdfast.training.config import RunConfig, config_from_dict, load_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
STORES = {"stores": ["a.store.safetensors"]}


def config_with(table: str, **values: object) -> RunConfig:
    return config_from_dict(
        {"data": STORES, "model": {"preset": "paper"}} | {table: values | (STORES if table == "data" else {})}
    )


def test_toml_and_dict_come_back() -> None:
    config = config_with(
        "train", learning_rate=1e-5, betas=[0.8, 0.95], epochs=0, max_minutes=2, tensorboard=True
    )
    assert config.train.betas == (0.8, 0.95)
    assert config.train.max_minutes == 2.0
    assert isinstance(config.train.max_minutes, float)
    assert config_from_dict(tomllib.loads(config.to_toml())) == config
    assert config_from_dict(config.to_dict()) == config


@given(st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), min_size=1))
def test_any_store_name_survives_toml(name: str) -> None:
    config = config_from_dict({"data": {"stores": [name]}, "model": {"preset": "paper"}})
    assert config_from_dict(tomllib.loads(config.to_toml())) == config


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.data.folds_validation == (0,)
    assert config.augment.profile == path.stem.partition("-")[0]


def test_a_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\npreset = "plain_cnn"\n[data]\nstores = ["a", "b"]\n[train]\nepochs = 5\n')
    config = load_config(
        path, ["train.epochs=3", "model.preset=paper", "data.folds_validation=[0, 1]", "train.seed = 7"]
    )
    assert (config.train.epochs, config.model.preset, config.train.seed) == (3, "paper", 7)
    assert config.data.folds_validation == (0, 1)
    assert config.data.stores == ("a", "b")
    assert load_config(path, ["data.stores=c.store.safetensors"]).data.stores == ("c.store.safetensors",)
    assert (
        load_config(None, ["data.stores=c", "model.preset=paper"]).train
        == RunConfig(config.model, config.data).train
    )


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (
            "augment",
            {"preparation": "measured"},
            "augment.preparation: must be known for sticks, got measured",
        ),
        ("train", {"learning_rate": -1}, "train.learning_rate: must be > 0, got -1.0"),
        ("train", {"learning_rate": "x"}, 'train.learning_rate: must be a finite number, got "x"'),
        ("train", {"learning_rate": float("nan")}, "train.learning_rate: must be a finite number, got nan"),
        ("train", {"learning_rate": True}, "train.learning_rate: must be a finite number, got true"),
        ("train", {"epochs": 1.5}, "train.epochs: must be a whole number, got 1.5"),
        ("train", {"epochs": 0}, "train.epochs: must be > 0 where train.max_minutes is 0, got 0"),
        ("train", {"batch_size": 0}, "train.batch_size: must be > 0, got 0"),
        ("train", {"betas": [0.9]}, r"train.betas: must be 2 values, got \[0.9\]"),
        ("train", {"betas": [0.9, 1.0]}, r"train.betas: must be two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ("train", {"warmup_fraction": 1.0}, r"train.warmup_fraction: must be in \[0, 1\), got 1.0"),
        (
            "train",
            {"schedule": "step"},
            'train.schedule: must be one of cosine, linear, constant, got "step"',
        ),
        ("train", {"precision": "fp8"}, "train.precision: must be one of float32, bf16"),
        ("train", {"balance": "mgd"}, "train.balance: must be one of mgda, mgda_ema, sum"),
        ("train", {"logit_adjustment": 3}, r"train.logit_adjustment: must be in \[0, 2\], got 3.0"),
        ("train", {"seed": 1 << 63}, r"train.seed: must be in 0..2\^63 - 1, got 9223372036854775808"),
        ("train", {"threads": 10_000}, "train.threads: must be in 0..1024, got 10000"),
        ("train", {"tensorboard": 1}, "train.tensorboard: must be true or false, got 1"),
        (
            "train",
            {"learning_rat": 1},
            r"train.learning_rat: must be a known key \(did you mean learning_rate\?\)",
        ),
        ("train", {"zzz": 1}, "train.zzz: must be a known key, got zzz"),
        ("augment", {"strain": 0.5}, r"augment.strain: must be in \[0, 0.02\], got 0.5"),
        ("augment", {"b_max": -2}, "augment.b_max: must be >= 0, got -2.0"),
        ("augment", {"profile": "x"}, 'augment.profile: must be one of sticks, lab, synchrotron, got "x"'),
        ("data", {"folds_validation": []}, r"data.folds_validation: must be folds in 0..9, got \[\]"),
        ("data", {"folds_validation": [10]}, "data.folds_validation: must be folds in 0..9"),
        ("data", {"folds_validation": ["a"]}, "data.folds_validation: must be a whole number"),
        ("data", {"clean": "yes"}, 'data.clean: must be true or false, got "yes"'),
        ("model", {"preset": "big"}, 'model.preset: must be one of .*, got "big"'),
        ("trian", {"epochs": 1}, r"trian: must be one of the tables .* \(did you mean train\?\)"),
    ],
)
def test_complaints_name_the_key(table: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        config_with(table, **values)
    assert "\n" not in str(caught.value)


def test_a_run_needs_stores() -> None:
    with pytest.raises(InputError, match=r"data.stores: must be one store or more, got \[\]"):
        config_from_dict({"model": {"preset": "paper"}})
    with pytest.raises(InputError, match=r'data.stores: must be one store or more, got \[""\]'):
        config_from_dict({"data": {"stores": ""}})


@pytest.mark.parametrize("override", ["epochs=3", "train.epochs", "=3", "train.=3", ".epochs=3"])
def test_a_malformed_override_is_named(override: str) -> None:
    with pytest.raises(InputError, match=r"override: must be table\.key=value"):
        load_config(None, [override])


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[data]\nstores = ["größe"]\n', encoding="utf-8-sig")
    assert load_config(path).data.stores == ("größe",)


def test_a_bad_override_is_told_without_a_file() -> None:
    with pytest.raises(InputError, match=r"^train\.epochs: must be >= 0, got -3$"):
        load_config(None, ["train.epochs=-3", "data.stores=a", "model.preset=paper"])


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    with pytest.raises(InputError, match=r"run\.toml: file: must be readable, got No such file"):
        load_config(path)
    path.write_text("[train\n")
    with pytest.raises(InputError, match=r"run\.toml: file: must be TOML"):
        load_config(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"run\.toml: file: must be TOML"):
        load_config(path)
    path.write_text("train = 3\n")
    with pytest.raises(InputError, match=r"run\.toml: train: must be a table, got 3"):
        load_config(path, ["train.epochs=3"])
    path.write_text("[train]\nepochs = -1\n")
    with pytest.raises(InputError, match=r"run\.toml: .*: must be"):
        load_config(path)
