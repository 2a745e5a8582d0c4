"""Kernels inside `shard_map`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec

from mlra_jax.ops.device import inside_shard_map


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` marked as varying over the mesh axes `axes` too, inside `shard_map`; gradients are summed over those."""
    missing = axes - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x


def unchecked(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` made to run also where `shard_map` checks over which axes arrays vary, although kernels do not say that.

    Forward and backward pass are traced without the axes and run in an inner `shard_map` without the checks. Outputs
    are then marked as varying over every axis over which some input does.

    Args:
      f: a function of a pytree of constants, and arrays; differentiable in the arrays.
    """

    def call(constants: Any, *args: Any) -> Any:
        if not inside_shard_map():
            return f(constants, *args)
        of = lambda x: jax.typeof(x).manual_axis_type.varying
        axes = frozenset().union(*map(of, args))

        def vary(tree: Any) -> Any:
            return jax.tree.map(lambda x: varying(x, axes), tree)

        def unsafe(g: Callable[..., Any], *args: Any) -> Any:
            def traced(*args: Any) -> Any:
                plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
                jaxpr, out = jax.make_jaxpr(g, return_shape=True)(*plain)
                return jax.tree.unflatten(
                    jax.tree.structure(out), jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args))
                )

            whole = PartitionSpec()
            inner = jax.shard_map(
                traced, in_specs=whole, out_specs=whole, axis_names=frozenset(), check_vma=False
            )
            return vary(inner(*args))

        @jax.custom_vjp
        def run(constants: Any, *args: Any) -> Any:
            return unsafe(f, constants, *args)

        def forward(constants: Any, *args: Any) -> tuple[Any, Any]:
            return unsafe(lambda c, *args: jax.vjp(functools.partial(f, c), *args), constants, *args)

        def backward(pullback: Any, g: Any) -> tuple[Any, ...]:
            return None, *unsafe(lambda pullback, g: pullback(g), pullback, g)

        run.defvjp(forward, backward)
        return run(constants, *vary(args))  # gradients are summed over the axes that this adds

    return call
