"""Lazy arrays, whose values are made on demand, so that data larger than memory can be passed around."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Tensor(Protocol):
    """Anything with a shape and a type that `np.asarray` accepts: an array, a `LazyTensor`, a `LazyStack`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...


class _Lazy:
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.size * self.dtype.itemsize


Index = tuple[slice, ...]
"""A slice of each axis."""


@dataclasses.dataclass(frozen=True)
class LazyTensor(_Lazy):
    """A tensor of known shape and type whose values are made by `np.asarray`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    read_part: Callable[[Index], np.ndarray] | None = None
    """Makes some of the values; None: all are made, and cut."""

    def part(self, index: Index) -> np.ndarray:
        """The values at `index`."""
        return np.asarray(self)[index] if self.read_part is None else self.read_part(index)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype=dtype)


@dataclasses.dataclass(frozen=True)
class LazyStack(_Lazy):
    """Tensors of one shape and type, stacked on a new first axis; each can be read separately."""

    layers: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the stack."""
        return len(self.layers), *self.layers[0].shape

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        """Type of all layers."""
        return self.layers[0].dtype

    def __getitem__(self, layer: int) -> LazyTensor:
        return self.layers[layer]

    def part(self, index: Index) -> np.ndarray:
        """The values at `index`, whose first slice is of layers."""
        return np.stack([layer.part(index[1:]) for layer in self.layers[index[0]]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        stack = np.empty(self.shape, dtype or self.dtype)
        for out, layer in zip(stack, self.layers, strict=True):
            out[...] = np.asarray(layer)
        return stack
