"""Hydra's own node while a job runs: HydraConfig, environment, logging, callbacks and `.hydra/hydra.yaml`."""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, env_override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from runner.config.options import literal, read_yaml, to_yaml
from runner.errors import UserError
from runner.files import replace_file

HYDRA_FILE = ".hydra/hydra.yaml"
_STOCK_LOGGING = Path(hydra.__file__).parent / "conf" / "hydra" / "job_logging" / "default.yaml"
T = TypeVar("T")


class HydraJob:
    """What Hydra knows of one job: `config` is the job's, with Hydra's own node as `hydra`."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.callbacks = Callbacks()
        self._return = JobReturn()

    @classmethod
    def of(
        cls,
        node: DictConfig,
        config: DictConfig | dict[str, Any],
        overrides: Sequence[str],
        number: int | None = None,
        choices: dict[str, Any] | None = None,
        sweep: Path | None = None,
    ) -> HydraJob:
        """Put Hydra's composed node and a job's config together.

        A sweep's job has a number; what has a sweep's folder and no number is the sweep itself.
        """
        whole = copy.deepcopy(node)
        with flag_override(whole, ["struct", "readonly"], False), flag_override(whole.hydra, "struct", False):
            own = whole.hydra
            own.mode = RunMode.RUN if number is None and sweep is None else RunMode.MULTIRUN
            own.overrides.task = list(overrides)
            if choices is not None:
                own.runtime.choices = choices
            if number is not None:
                own.job.num, own.job.id = number, str(number)
            if sweep is not None:
                own.sweep.dir = str(sweep)
            if not OmegaConf.is_interpolation(own.job, "override_dirname"):  # as it is from Hydra 1.4 on
                own.job.override_dirname = _dirname(overrides, own.job.config.override_dirname)
            config = OmegaConf.create(literal(config)) if isinstance(config, dict) else config
            for key in config:
                whole[key] = config._get_node(key)
        return cls(whole)

    @property
    def node(self) -> DictConfig:
        """Hydra's own node."""
        own = self.config.hydra
        assert isinstance(own, DictConfig)
        return own

    @property
    def chdir(self) -> bool:
        """Whether the job's current folder is its own."""
        return bool(self.node.job.chdir)

    def callback_nodes(self) -> dict[str, Any]:
        """Return the nodes of `hydra.callbacks`, resolved."""
        with self.active():
            nodes = OmegaConf.to_container(self.node.callbacks, resolve=True)
        assert isinstance(nodes, dict)
        return {str(name): node for name, node in nodes.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let `${hydra:…}` and `HydraConfig.get()` read the node, in the environment of `hydra.job.env_set`."""
        instance = HydraConfig.instance()
        before, instance.cfg = instance.cfg, self.config  # type: ignore[assignment]
        try:
            with env_override(self.node.job.env_set):
                yield
        finally:
            instance.cfg = before

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Surround all of a run, from before its folder is made, or of a sweep; a sweep's jobs have none."""
        given: dict[str, Any] = {"config": self.config, "config_name": "config"}
        callbacks, is_run = self.callbacks, self.node.mode == RunMode.RUN
        with self.active():
            if not is_run and not OmegaConf.is_missing(self.node.job, "num"):
                yield
                return
            (callbacks.on_run_start if is_run else callbacks.on_multirun_start)(**given)
            try:
                yield
            finally:
                if is_run:
                    callbacks.on_run_end(**given, job_return=self._return)
                else:
                    callbacks.on_multirun_end(**given)

    def run(self, folder: Path, function: Callable[[], T]) -> T:
        """Call the function as the job of a folder: with its logging, and with callbacks before and after."""
        with flag_override(self.node, ["struct", "readonly"], False):
            self.node.runtime.output_dir = str(folder.absolute())
            if self.node.mode == RunMode.RUN:
                self.node.run.dir = str(folder)
            else:
                self.node.sweep.subdir = folder.name
        if not (folder / HYDRA_FILE).exists():  # as the run's start wrote it
            own = OmegaConf.to_container(self.node, enum_to_str=True)
            replace_file(folder / HYDRA_FILE, to_yaml({"hydra": own}).encode())

        result = self._return = JobReturn(
            overrides=list(self.node.overrides.task),
            cfg=self.config,
            hydra_cfg=self.config,
            working_dir=str(folder.absolute() if self.chdir else Path.cwd()),
            task_name=str(self.node.job.name),
        )
        with self._logging():
            self.callbacks.on_job_start(config=self.config, task_function=lambda _: function())
            try:
                returned = function()
                result.return_value, result.status = returned, JobStatus.COMPLETED
            except BaseException as error:
                result.return_value, result.status = error, JobStatus.FAILED
                raise
            finally:
                self.callbacks.on_job_end(config=self.config, job_return=result)
        return returned

    @contextlib.contextmanager
    def _logging(self) -> Iterator[None]:
        """Configure Python's logging as `hydra/job_logging` and `hydra.verbose` say, if they say anything."""
        own = self.node
        typed = any("job_logging" in line for line in own.overrides.hydra)
        stock = OmegaConf.to_container(own.job_logging) == read_yaml(_STOCK_LOGGING)
        if stock and not typed and not own.verbose:  # Hydra's default would print what other packages say
            yield
            return

        root, levels = logging.getLogger(), {}
        names = own.verbose if OmegaConf.is_list(own.verbose) else [own.verbose]
        loggers = [root, *(logging.getLogger(name) for name in names if isinstance(name, str))]
        levels = {logger: logger.level for logger in loggers}
        handlers, root.handlers[:] = list(root.handlers), []
        try:
            configure_log(own.job_logging, own.verbose)
            yield
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers[:] = handlers
            for logger, level in levels.items():
                logger.setLevel(level)


def chosen_options(node: DictConfig) -> dict[str, Any]:
    """Return the chosen option of every group; `node` holds Hydra's own as `hydra`."""
    return {str(k): v for k, v in node.hydra.runtime.choices.items() if v is not None}


def subfolder(node: DictConfig, config: dict[str, Any], overrides: Sequence[str], number: int) -> str | None:
    """Return the name that `hydra.sweep.subdir` gives a job's folder; None where nobody has set it.

    Raises:
        UserError: the folder would not lie in the sweep's, or the name cannot be resolved.
    """
    own: Any = OmegaConf.to_container(node.hydra.sweep)
    if own["subdir"] == "${hydra.job.num}":
        return None
    job = HydraJob.of(node, config, overrides, number)
    try:
        with job.active():
            name = str(job.node.sweep.subdir)
    except OmegaConfBaseException as error:
        raise UserError(f"hydra.sweep.subdir={own['subdir']}: {str(error).splitlines()[0]}") from None
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or parts[0].startswith("."):
        raise UserError(
            f"hydra.sweep.subdir={own['subdir']}: expected a folder of the sweep's, got {name!r}."
        )
    return str(Path(name))


def lasting_settings(node: DictConfig) -> dict[str, Any]:
    """Return what Hydra's own node says of every job of a sweep, whatever its options; launchers apart."""
    own: Any = OmegaConf.to_container(node.hydra)
    settings = {k: v for k, v in own.items() if k not in ("runtime", "overrides", "job", "launcher")}
    return settings | {key: own["job"][key] for key in ("name", "chdir", "env_set")}


def _dirname(overrides: Sequence[str], settings: Any) -> str:
    """Return the overrides in one word, as Hydra names folders by them."""
    keys = {line: line.lstrip("+~").partition("=")[0].partition("@")[0] for line in overrides}
    lines = sorted(line for line, key in keys.items() if key not in settings.exclude_keys)
    return re.sub("=", lambda _: str(settings.kv_sep), str(settings.item_sep).join(lines))
