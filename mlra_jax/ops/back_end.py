"""The protocol of back ends: all that `dispatch` knows of an op's implementations (docs/kernels.md)."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

import jax

from mlra_jax.ops import device, tuning

S = TypeVar("S")
C = TypeVar("C")


class BackEnd:
    """One implementation of an op: called like every other of the same op, it computes or declines."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the op.

        Raises:
          NotImplementedError: it does not take this call; the message says why.
        """
        raise NotImplementedError

    def reason_to_decline(self, *args: Any, **kwargs: Any) -> str | None:
        """Why it does not take a call; None: it does. Traces the call, because libraries may refuse it only then."""
        try:
            self(*args, **kwargs)
        except NotImplementedError as e:
            return str(e)
        return None


@dataclasses.dataclass(frozen=True)
class Function(BackEnd):
    """A function of plain JAX as a back end; it takes every call."""

    function: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function."""
        return self.function(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Lazy(BackEnd):
    """A back end whose module is imported on its first call, for a device that it is made for.

    It declines where the module cannot be imported: JAX lacks such a part on some platforms and in some versions.
    """

    module: str
    name: str
    """The class in it, which is called without arguments."""
    require: Callable[[], Any] = lambda: None
    """Raises `device.WrongDeviceError` where another device is compiled for: it saves the import, up to a second."""

    def load(self) -> BackEnd:
        """The back end itself.

        Raises:
          NotImplementedError: the device is not one that it is made for, or the module cannot be imported.
        """
        self.require()
        try:
            return getattr(importlib.import_module(self.module), self.name)()
        except Exception as e:
            raise NotImplementedError(
                f"{self.module} does not work with JAX {jax.__version__} here ({type(e).__name__}: {e})."
            ) from e

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the back end."""
        return self.load()(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Kernel(BackEnd, Generic[S, C]):
    """A back end that takes some calls, and may be tiled in several ways.

    A call checks its arguments (`check`), looks for a tiling (`tiling`) and runs (`run`). An instance is an
    `implementation` like any other: `latent_decode_attention(..., implementation=MosaicGPU(config=Config(...)))`.
    """

    config: C | None = None
    """The tiling; None: the tuned table's, or else the heuristic's."""
    interpret: Any = None
    """Runs the kernel on the CPU: `plgpu.InterpretGPUParams()` for Mosaic GPU, True or `pltpu.InterpretParams()` for
    Mosaic TPU. Triton's interpreter is switched on otherwise."""

    name: ClassVar[str]
    """What `implementation` and tuned tables call it."""
    config_type: ClassVar[Any] = None
    """The class of its tiling, a frozen dataclass of integers with `heuristic` and `fits`; None: there is no choice."""
    tuned_tables: ClassVar[pathlib.Path | None] = None
    """The folder of tuned tables (`mlra_jax.ops.tuning`); None: it has none."""

    def check(self, *args: Any, **kwargs: Any) -> S:
        """The static sizes of a call.

        Raises:
          NotImplementedError: it does not take the call; the message says why.
        """
        raise NotImplementedError

    def target(self) -> Any:
        """What tilings must know of the device that is compiled for.

        Raises:
          NotImplementedError: it is none that the kernel runs on.
        """
        return None

    def heuristic(self, shape: S) -> Any:
        """A tiling that fits the device: what `heuristic` of the tiling's class says."""
        return None if self.config_type is None else self.config_type.heuristic(shape, self.target())

    def tuning_key(self, shape: S) -> Mapping[str, Any]:
        """The sizes by which tuned tables know a call."""
        raise NotImplementedError

    def adapt(self, config: Any, measured: Mapping[str, Any], shape: S) -> C | None:
        """What this call can run of a tiling that was measured with other sizes; None: nothing."""
        return config if config.fits(shape, self.target()) else None

    def tuned(self, shape: S) -> C | None:
        """The tiling that was measured to be fastest on this kind of device; None: the tables hold none."""
        if self.tuned_tables is None or self.config_type is None or self.interpret:
            return None
        return tuning.find(
            self.tuned_tables,
            device.current_device()[1],
            self.name,
            self.tuning_key(shape),
            make=self.config_type,
            adapt=lambda config, measured: self.adapt(config, measured, shape),
        )

    def tiling(self, shape: S) -> Any:
        """The tiling of a call: the one given, or else the tuned one, or else the heuristic's."""
        return self.config or self.tuned(shape) or self.heuristic(shape)

    def run(self, shape: S, config: C, *args: Any, **kwargs: Any) -> Any:
        """Computes the op for a call that `check` has passed."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the call, chooses its tiling, and runs it."""
        shape = self.check(*args, **kwargs)
        return self.run(shape, self.tiling(shape), *args, **kwargs)
