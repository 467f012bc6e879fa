"""What Hydra prints of a config: the config itself, how it is composed, what a word may become."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from typing import Any

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.plugins.completion_plugin import DefaultCompletionPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.command import CONF, Command, show
from runner.config.compose import compose_unresolved, hydra_of_conf, search_path
from runner.config.options import explained_keys, groups, has_key, leaves, option_files
from runner.config.setup import import_own_code
from runner.errors import UserError, raise_first, unknown


class _Printer(Hydra):
    """Hydra with a config that is composed already."""

    def __init__(self, config: DictConfig):
        super().__init__("runner", GlobalHydra.instance().config_loader())
        self.config = config

    def compose_config(self, *_: Any, **__: Any) -> DictConfig:
        return copy.deepcopy(self.config)


def config_text(
    command: Command, kind: str = "job", package: str | None = None, resolve: bool = False
) -> str:
    """Return what Hydra's `--cfg` prints: the config of a job, Hydra's own node, or both.

    Raises:
        UserError: it does not compose, lacks the package, or cannot be resolved.
    """
    config, _ = compose_unresolved(command)
    raise_first([_package_error(package, config, kind)])
    with _printing(config) as (printer, output):
        try:
            printer.show_cfg("config", [], kind, package, resolve)
        except OmegaConfBaseException as error:
            key = error.full_key or package or "the config"
            raise UserError(f"{key} cannot be resolved: {str(error).splitlines()[0]}") from None
    return output.getvalue().rstrip()


def info_text(command: Command, topic: str) -> str:
    """Return what Hydra's `--info` prints of a composition.

    Raises:
        UserError: it does not compose.
    """
    config, lines = compose_unresolved(command)
    with _printing(config) as (printer, output):
        printer.show_info(topic, "config", [*search_path(command), *lines])
    return output.getvalue().strip("\n")


def hydra_groups() -> str:
    """Return Hydra's own groups that a run may select, with their options."""
    with _printing(OmegaConf.create()) as (printer, _):
        return printer.format_config_groups(
            lambda group: group in ("hydra/launcher", "hydra/job_logging")
        ).rstrip()


def hydra_version() -> str:
    """Return the version of Hydra that is installed."""
    return hydra.__version__


def explained(command: Command) -> dict[str, dict[str, str]]:
    """Return every key of a config as it is typed, with the comment of the YAML, by group and chosen option.

    Raises:
        UserError: it does not compose.
    """
    config, _ = compose_unresolved(command)
    available = groups(command)
    choices = {str(k): str(v) for k, v in config.hydra.runtime.choices.items() if v is not None}

    # comments, of which the last file has the last word; a node of ConfigStore has none
    meanings = {key: meaning for key, _, meaning in explained_keys(CONF / "config.yaml")}
    files = [(file, node) for file, node in option_files(choices, available) if file.is_file()]
    for file, node in files:
        keys = ((f"{node}.{key}" if node else key, meaning) for key, _, meaning in explained_keys(file))
        meanings |= {key: meaning for key, meaning in keys if meaning or key not in meanings}

    # keys, those of the root first
    sections: dict[str, dict[str, str]] = {"": {}}
    for key, value in leaves(OmegaConf.to_container(config)):
        group, _, rest = key.partition(".")
        if group == "hydra" or key in ("name", "description") or key.endswith("_target_"):
            continue
        title = f"{group}={choices[group]}" if rest and group in choices else group if rest else ""
        sections.setdefault(title, {})[f"{key}={show(value)}"] = meanings.get(key, "")
    return sections


def matches(word: str, words: list[str], command: Command) -> list[str]:
    """Return the groups, options and keys that a word may become, after these words.

    Nothing where the words do not compose, as they do not while they are typed.
    """
    before = [*search_path(command), *words]
    import_own_code(command)
    with _hydra() as loader, contextlib.suppress(Exception):
        completion = DefaultCompletionPlugin(loader)
        found, is_complete = completion._query_config_groups(word, "config", before)
        if not is_complete:
            config = loader.load_configuration("config", before, RunMode.MULTIRUN)
            found = [*found, *completion._get_matches(config, word)]
        return sorted(set(found))
    return []


@contextlib.contextmanager
def _hydra() -> Iterator[Any]:
    """Yield Hydra's loader of the runner's files."""
    with hydra_of_conf():
        yield GlobalHydra.instance().config_loader()


@contextlib.contextmanager
def _printing(config: DictConfig) -> Iterator[tuple[_Printer, io.StringIO]]:
    """Yield what prints a config as Hydra does, and what it has printed; its logger is put back."""
    root, shown = logging.getLogger(), HydraConfig.instance().cfg
    level, handlers = root.level, list(root.handlers)
    try:
        with _hydra(), contextlib.redirect_stdout(io.StringIO()) as output:
            yield _Printer(config), output
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        HydraConfig.instance().cfg = shown


def _package_error(package: str | None, config: DictConfig, kind: str) -> UserError | None:
    """Return the error unless the config has the node that is to be shown."""
    names = [str(key) for key in config if kind == "all" or (key == "hydra") == (kind == "hydra")]
    if package in (None, "_global_") or (package.split(".")[0] in names and has_key(config, package)):
        return None
    refused = unknown("node", package, names, f"--package={package}")
    return UserError(str(refused), None, refused.right)
