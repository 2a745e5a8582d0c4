"""How query heads are laid out by cached head and device for decoding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlra_jax.attention.head_shards import HeadShards
from mlra_jax.sharding import AxisRules


@settings(max_examples=25, deadline=None)
@given(branches=st.integers(1, 4), groups=st.integers(1, 4), rows=st.integers(1, 3))
def test_without_a_mesh_each_cached_head_serves_its_group_and_every_query_head_is_served_by_each_branch(
    branches, groups, rows
):
    n_heads, n_cached = groups * rows, branches * groups
    shards = HeadShards(AxisRules(), n_heads, n_cached, branches)
    assert (shards.copies, shards.count, shards.heads_per_shard) == (1, n_cached, rows)
    heads = np.arange(n_heads)[None, None, :, None]
    served = np.asarray(shards.gather(jnp.asarray(heads), n_cached))[0, 0, :, :, 0]  # [U, rows]
    for u in range(n_cached):
        assert served[u].tolist() == [u % groups * rows + i for i in range(rows)]
    # Weights by branch and head go to the slot that serves them.
    by_head = np.array([[(j, n) for n in range(n_heads)] for j in range(branches)])
    laid_out = np.asarray(shards.heads_to_shards(jnp.asarray(by_head)))
    for u in range(n_cached):
        assert laid_out[u].tolist() == [[u // groups, n] for n in served[u].tolist()]
    # Summing over shards counts each head once for each branch.
    ones = jnp.ones((1, 1, n_cached, rows, 1))
    assert np.asarray(shards.scatter(ones)).ravel().tolist() == [branches] * n_heads


@pytest.mark.parametrize(
    ("n_heads", "n_cached", "branches", "tensor"),
    [(8, 4, 4, 8), (8, 4, 2, 8), (8, 1, 1, 4), (8, 2, 1, 8), (8, 4, 4, 2), (12, 2, 1, 4)],
)
def test_on_a_mesh_the_devices_slots_serve_every_head_once_for_each_branch(
    on_mesh, n_heads, n_cached, branches, tensor
):
    with on_mesh(1, 1, tensor, 1):
        rules = AxisRules.of(kv_head_shards="tensor")
        shards = HeadShards(rules, n_heads, n_cached, branches)
        assert shards.count == max(n_cached, tensor)
        assert shards.copies == max(1, tensor // n_cached)
        q = jnp.arange(n_heads)[None, None, :, None] * jnp.ones((1, 1, 1, 2))
        weights = shards.heads_to_shards(
            jnp.broadcast_to(jnp.arange(n_heads), (branches, n_heads))[..., None]
        )

        def local(q, weights):
            u = weights.shape[0]
            served = shards.gather(q, u)  # [B, T, u, rows, 2]: which head each row is
            matches = (served[0, 0, :, :, :1] == weights).all()
            return rules.psum(shards.scatter(served), "kv_head_shards"), rules.psum(
                1 - matches, "kv_head_shards"
            )

        names = ((None,) * 4, ("kv_head_shards", None, None))
        run = rules.shard_map(local, names, ((None,) * 4, ()))
        summed, mismatches = jax.jit(run)(q, weights)
    assert int(mismatches) == 0
    np.testing.assert_array_equal(summed[0, 0, :, 0], branches * np.arange(n_heads))
