"""Looking up rows of a table, with a gradient that has the same bits each time, on GPUs too.

The gradient of a look-up adds rows to those that they were taken from. On GPUs XLA does that with atomic additions,
whose order, and so the last digits of whose sum, differ from run to run; its deterministic form is a slow loop. Here
ids are sorted, equal ones summed by products, and each row of the table takes its sum: a gather, and no scatter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

BLOCK = 128
"""Rows that are summed by one product, of a square matrix of this size."""


@jax.custom_vjp
def take_rows(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """`table_VD[ids]` for integers in [0, V), whose gradient is made by `sum_rows`."""
    return table_VD[ids]


def _forward(table_VD: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Of the table only shape and type are needed; an array without rows has them.
    return table_VD[ids], (table_VD[:, :0], ids)


def _backward(saved: tuple[jax.Array, jax.Array], rows: jax.Array) -> tuple[jax.Array, None]:
    table_V0, ids = saved
    sums_VD = sum_rows(ids.ravel(), rows.reshape(ids.size, -1), len(table_V0))
    return sums_VD.astype(table_V0.dtype), None


take_rows.defvjp(_forward, _backward)


def sum_rows(ids_N: jax.Array, rows_ND: jax.Array, n: int) -> jax.Array:
    """The sums of rows with equal ids: row i of the result, float32 [n, D], is that of the rows whose id is i.

    In which order rows are added depends on the ids alone. Rows whose id is not in [0, n) are left out. What is not
    finite in a row may spread to others.
    """
    padding = -ids_N.size % BLOCK
    ids_N = jnp.pad(ids_N, (0, padding), constant_values=n)
    rows_ND = jnp.pad(rows_ND, ((0, padding), (0, 0)))
    ids_N, order_N = jax.lax.sort_key_val(ids_N, jnp.arange(ids_N.size))  # it is stable
    ids_MB = ids_N.reshape(-1, BLOCK)
    rows_MBD = rows_ND[order_N].reshape(*ids_MB.shape, -1)

    # Each row becomes the sum of its block's rows with its id.
    equal_MBB = ids_MB[:, :, None] == ids_MB[:, None, :]
    sums_MBD = _product("mij,mjd->mid", equal_MBB, rows_MBD)
    # The last id of a block may go on in later ones, which then begin with it.
    first_M1, last_M1, block_M = ids_MB[:, :1], ids_MB[:, -1:], jnp.arange(len(ids_MB))
    goes_on_MM = (last_M1 == first_M1.T) & (block_M[:, None] < block_M)
    later_MD = _product("ij,jd->id", goes_on_MM, sums_MBD[:, 0])
    sums_MBD += jnp.where((ids_MB == last_M1)[..., None], later_MD[:, None], 0)

    # The first row of an id is now the sum of all.
    row_V = jnp.arange(n)
    first_V = jnp.searchsorted(ids_N, row_V, method="scan_unrolled")
    first_V = jnp.minimum(first_V, ids_N.size - 1)
    sums_VD = sums_MBD.reshape(ids_N.size, -1)[first_V]
    return jnp.where((ids_N[first_V] == row_V)[:, None], sums_VD, 0)


def _product(equation: str, chosen: jax.Array, rows: jax.Array) -> jax.Array:
    """Sums of chosen rows; exact but for their float32 additions."""
    return jnp.einsum(
        equation,
        chosen.astype(rows.dtype),
        rows,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
