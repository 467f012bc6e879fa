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
SMALL = {"val_size": 32, "test_size": 32}
FIVE = {"min_length": 4, "max_length": 5, "train_size": 40, "val_size": 4, "test_size": 4, "length_size": 200}
WRONG: dict[type, list[dict[str, Any]]] = {
    CIFAR10: [
        *({"batch_size": 0}, {"val_size": -10}, {"val_size": 5001}, {"val_size": 50_000}),
        *({"flip": -0.1}, {"flip": 1.1}, {"flip": NAN}, {"root": ""}),
    ],
    FashionMNIST: [
        *({"batch_size": 0}, {"eval_batch_size": 0}, {"val_size": -10}, {"val_size": 5001}),
        *({"val_size": 60_000}, {"shift": -1}, {"shift": 28}, {"flip": -0.1}, {"flip": 1.1}, {"flip": NAN}),
        *({"root": ""}, {"root": "~no_such_user_here/data"}),
    ],
    ImageFolder: [
        *({"root": None}, {"root": ""}, {"size": 0}, {"channels": 2}, {"val_size": -0.1}, {"val_size": 1.5}),
        *({"test_size": NAN}, {"test_size": -3}, {"flip": 1.1}, {"batch_size": 0}, {"cache": ""}),
    ],
    Lookups: [
        *({"slots": 1}, {"train_size": 402}, {"val_size": -4}, {"test_size": 0}, {"batch_size": 0}),
    ],
    Sentences: [
        *({"max_length": 2}, {"min_length": 3}, {"min_length": 17}, {"train_size": 0}, {"test_size": 6}),
        *({"length_size": -4}, {"lengths": (12,)}, {"batch_size": 0}),
    ],
}


@pytest.mark.parametrize(
    ("kind", "argument"), [(kind, wrong) for kind in WRONG for wrong in WRONG[kind]], ids=str
)
def test_argument_out_of_range_is_named_with_its_value(kind: type, argument: dict[str, Any]) -> None:
    [(name, value)] = argument.items()
    value = value[0] if isinstance(value, tuple) else value
    needed = {"root": "somewhere"} if kind is ImageFolder else {}
    with pytest.raises(ValueError, match=rf"^{name} .*{value or ''}$"):
        kind(**needed | argument)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Sentences, {"max_length": 5}, "max_length allows 328 samples, and 19,000 "),
        (Sentences, {**FIVE, "lengths": (5,)}, "lengths allows 320 samples, and 248 "),
        (Lookups, {**SMALL, "slots": 3, "train_size": 84}, "slots allows 288 samples, and 148 "),
    ],
)
def test_more_than_half_of_all_samples_is_refused(
    kind: type, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_yaml_gives_every_argument_its_default(path: Path) -> None:
    node = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(node, dict)
    parameters = inspect.signature(get_class(node.pop("_target_"))).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert node == {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items()}


@pytest.mark.parametrize(
    ("kind", "digests"),
    [(CIFAR10, cifar10._TRAIN), (CIFAR10, cifar10._TEST), (FashionMNIST, fashion_mnist._DIGESTS)],
)
def test_digest_is_of_the_files(
    kind: type[CIFAR10 | FashionMNIST], digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kind().digest()
    assert len(before) == 64 and kind(val_size=10).digest() == before
    monkeypatch.setitem(digests, list(digests)[-1], "0" * 64)
    assert kind().digest() != before


def test_home_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert FashionMNIST("~/data").root == tmp_path / "data"
