"""Finds and loads configuration files, and parses `CONFIG [--field VALUE ...]`.

A configuration file is Python: it defines `get_config() -> TrainConfig`, and may import files beside it relatively
(`from ._paper import paper_config`); names that start with an underscore are for such files alone. Or it is the
`config.json` in a run's folder: the run's fully resolved configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import json
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import tyro

from mlra_jax import config as config_module
from mlra_jax.config import MOVED, ConfigError, TrainConfig, from_dict, nearest
from mlra_jax.textfiles import read_text

_serial = itertools.count()


def config_folders() -> list[Path]:
    """Folders in which a bare name is looked up, in order: `./configs`, then the package's configurations."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    # In a source checkout they lie beside the package; the wheel moves them into it.
    return [Path("configs"), installed if installed.is_dir() else package.parent / "configs"]


def config_names() -> list[str]:
    """The names that `load_config` finds, sorted."""
    files = [f for folder in config_folders() if folder.is_dir() for f in folder.glob("[!_]*.py")]
    return sorted({f.stem for f in files})


def _find(path_or_name: str) -> Path:
    given = Path(path_or_name)
    is_name = given.parent == Path() and given.suffix not in (".py", ".json")
    places = [folder / f"{given}.py" for folder in config_folders()] if is_name else [given]
    for place in places:
        if place.is_file():
            return place
    names = config_names()
    raise ConfigError(
        f"No configuration {path_or_name}.{nearest(given.stem, names)} Give the path of a Python file that defines "
        f"get_config() or of a run's config.json, or one of: {', '.join(names)}."
    )


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    """Turns an error raised by the configuration file `path`, or a file beside it, into sentences: where and what."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{path}: {fault}" for fault in error.faults]) from error
    except SyntaxError as error:
        raise ConfigError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve().parent == path.resolve().parent
        ]
        where = f"{frames[-1].filename}, line {frames[-1].lineno}" if frames else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}{_suggestion(error)}") from error


def _suggestion(error: Exception) -> str:
    """A hint for a misspelt field of a configuration class; empty for any other error."""
    call = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'$", str(error))
    cls = getattr(config_module, call[1], None) if call else None
    if call is None or not dataclasses.is_dataclass(cls):
        return ""
    return "." + nearest(call[2], [f.name for f in dataclasses.fields(cls)])


def _execute(path: Path) -> types.ModuleType:
    """Runs the file `path` as a module of a synthetic package, so that relative imports find the files beside it."""
    package = types.ModuleType(f"_mlra_configs_{next(_serial)}")
    package.__path__ = [str(path.resolve().parent)]
    spec = importlib.util.spec_from_file_location(f"{package.__name__}.{path.stem}", path.resolve())
    assert spec is not None  # the suffix is .py,
    assert spec.loader is not None  # so there is a loader
    module = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()
    sys.modules |= {package.__name__: package, spec.name: module}
    spec.loader.exec_module(module)
    return module


def _of_its_folder(config: TrainConfig, path: Path) -> TrainConfig:
    """Returns `config` for the run whose folder it was found in, which may have been moved or copied."""
    folder = path.absolute().parent
    is_run = path.name == "config.json" and (folder / "checkpoints").is_dir()
    if not is_run or folder.resolve() == Path(config.run_dir).resolve():
        return config
    print(
        f"note: {path} names {config.run_dir} as its run's folder, and was moved or copied; the run is now {folder}.",
        file=sys.stderr,
    )
    return dataclasses.replace(config, out=str(folder))


def load_config(path_or_name: str, *, afresh: bool = False) -> TrainConfig:
    """Loads and validates a configuration: what a file's `get_config()` returns, or what a run's `config.json` holds.

    Args:
      path_or_name: path of a `.py` file or of a run's `config.json`, or a bare name such as `tiny`, looked up in
        `config_folders()`.
      afresh: ignore what a run chose for its devices when reading its `config.json` (see `from_dict`).

    Raises:
      ConfigError: there is no such file, it cannot be run, or its `get_config()` is missing or returns something other
        than a valid `TrainConfig`; all faults are listed.
    """
    path = _find(path_or_name)
    if path.suffix == ".json":
        try:
            stored = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not the config.json of a run: {error}.") from error
        with _explaining(path):
            return _of_its_folder(from_dict(stored, afresh=afresh), path)
    if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python file; a configuration is a .py file with get_config().")
    with _explaining(path):
        get_config = getattr(_execute(path), "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{path} defines no function get_config(); it must return the run's TrainConfig.")
    with _explaining(path):
        config = get_config()
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"get_config() in {path} returned a {type(config).__name__}; it must return a TrainConfig."
        )
    with _explaining(path):
        config.validate()
    return config


def _renamed(word: str) -> str:
    """Replaces an option of an earlier version by its present name, and says so."""
    name, *value = word.split("=", 1)
    new = MOVED.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return word
    print(f"{name} is called --{new} now.", file=sys.stderr)
    return "=".join([f"--{new}", *value])


def parse_train_args(argv: Sequence[str], prog: str | None = None, *, afresh: bool = False) -> TrainConfig:
    """Parses and validates the configuration of a command line `CONFIG [--field VALUE ...]`.

    `--help` prints every field with its value in CONFIG (its default when there is no CONFIG) and exits with
    status 0; an unknown or malformed option prints what is allowed and exits with status 2.

    Args:
      argv: the arguments after the program's name.
      prog: the program's name in the help; None: as it was called.
      afresh: see `load_config`.

    Raises:
      ConfigError: CONFIG is missing or cannot be loaded, or the resulting configuration is not legal.
    """
    prog = prog or Path(sys.argv[0]).name
    argv = [_renamed(word) for word in argv]
    names = ", ".join(config_names())
    if argv and not argv[0].startswith("-"):
        chosen, rest = argv[0], argv[1:]
        default = load_config(chosen, afresh=afresh)
    elif {"-h", "--help"} & set(argv):
        chosen, rest = "CONFIG", argv
        default = TrainConfig()
    else:
        raise ConfigError(
            f"The first argument must be a configuration: {prog} CONFIG [--field VALUE ...]. Known: {names}."
        )
    config = tyro.cli(
        TrainConfig,
        args=rest,
        default=default,
        prog=f"{prog} {chosen}",
        description=(
            "Trains a model. CONFIG is the path of a Python file that defines get_config() or of a run's config.json, "
            f"or one of: {names}. Every field below can be set; its value in CONFIG is shown. With --check-determinism "
            "[STEPS] nothing is written: the first steps are made several times and their bits compared. On several "
            "hosts, add to the command on each: --distributed.auto (TPU pod, Slurm, Open MPI), or "
            "--distributed.coordinator HOST:PORT, --distributed.processes N and --distributed.process_id I."
        ),
        use_underscores=True,
    )
    config.validate()
    return config
