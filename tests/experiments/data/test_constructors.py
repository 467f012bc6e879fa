"""Every data set: its arguments are checked by name, and its YAML file gives each argument its default."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

from experiments.data import cifar10, fashion_mnist
from experiments.data.cifar10 import CIFAR10
from experiments.data.fashion_mnist import FashionMNIST
from experiments.data.image_folder import ImageFolder
from experiments.data.lookups import Lookups
from experiments.data.sentences import Sentences

CONF = Path(__file__).resolve().parents[3] / "conf" / "data"
NAN = float("nan")
IMAGES = {"batch_size": [0], "flip": [-0.1, 1.1, NAN], "root": [None, "", "~no_such_user/data"]}
WRONG: dict[type, dict[str, list[Any]]] = {
    CIFAR10: IMAGES | {"val_size": [-10, 5001, 50_000]},
    FashionMNIST: IMAGES | {"val_size": [-10, 5001, 60_000], "eval_batch_size": [0], "shift": [-1, 28]},
    ImageFolder: IMAGES
    | {"val_size": [-0.1, 1.5], "test_size": [NAN, -3], "size": [0], "channels": [2], "cache": [""]},
    Lookups: {"batch_size": [0], "train_size": [402], "val_size": [-4], "test_size": [0], "slots": [1]},
    Sentences: {"batch_size": [0], "train_size": [0], "test_size": [6], "length_size": [-4]}
    | {"max_length": [2], "min_length": [3, 17], "lengths": [(12,)]},
}


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(kind, name, value) for kind in WRONG for name, values in WRONG[kind].items() for value in values],
)
def test_argument_out_of_range_is_named_with_its_value(kind, name, value):
    needed = {"root": "somewhere"} if kind is ImageFolder else {}
    shown = value[0] if isinstance(value, tuple) else value or ""
    with pytest.raises(ValueError, match=rf"^{name} .*{shown}$"):
        kind(**needed | {name: value})


def test_more_than_half_of_all_samples_is_refused():
    sizes = {"val_size": 4, "test_size": 4}
    with pytest.raises(ValueError, match="max_length allows 328 samples, and 19,000 are more than half "):
        Sentences(max_length=5)
    with pytest.raises(ValueError, match="lengths allows 320 samples, and 248 are "):
        Sentences(4, 5, (5,), train_size=40, length_size=200, **sizes)
    with pytest.raises(ValueError, match="slots allows 288 samples, and 148 are "):
        Lookups(3, train_size=140, **sizes)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_gives_every_argument_its_default(path):
    node = dict(OmegaConf.load(path))
    parameters = inspect.signature(get_class(node.pop("_target_"))).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert node == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


def test_digest_is_of_the_files(monkeypatch):
    train, test = (CIFAR10, cifar10._TRAIN), (CIFAR10, cifar10._TEST)
    for kind, digests in (train, test, (FashionMNIST, fashion_mnist._DIGESTS)):
        before = kind().digest()
        assert len(before) == 64 and kind(val_size=10).digest() == before
        monkeypatch.setitem(digests, list(digests)[-1], "0" * 64)
        assert kind().digest() != before


def test_home_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FashionMNIST("~/data").root == tmp_path / "data"
