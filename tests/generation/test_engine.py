"""The engine makes the tokens that the model's full forward pass would, whatever the mesh, the batch and the way."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mlra_jax.attention.kv_cache import Cache, values_per_token
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.config import ConfigError, MeshConfig, ModelConfig
from mlra_jax.generation import engine as engine_module
from mlra_jax.generation.engine import LENGTH_UNIT, NO_TOKEN, Engine, chunk_sizes, largest_chunk
from mlra_jax.generation.sampling import GREEDY, Sampling
from mlra_jax.model import from_params, transformer
from mlra_jax.ops.all_reduce import Workspace
from mlra_jax.ops.dispatch import choose, explain
from mlra_jax.sharding import decode_rules, make_mesh

SAMPLING = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01)
N_NEW = 12

# (data, tensor, context), and whether the query heads of W_qb and W_o are split; tests/model/test_sharded.py holds the
# logits of the slow ones to the full forward pass.
LAYOUTS = [
    ((1, 1, 1), True),
    ((1, 2, 1), False),
    ((1, 4, 1), True),
    ((1, 4, 2), True),
    pytest.param((2, 2, 2), True, marks=pytest.mark.smoke),
    *(
        pytest.param(*layout, marks=pytest.mark.slow)
        for layout in (((1, 4, 1), False), ((1, 8, 1), True), ((1, 8, 1), False))
    ),
]


@pytest.mark.parametrize(("sizes", "split_heads"), LAYOUTS)
def test_greedy_tokens_are_those_of_full_forward_passes(
    sizes, split_heads, engine, rollout, prompts, tokens_of
):
    rows = engine("mlra_4", sizes, split_heads).start(prompts, [N_NEW] * 4)
    expected = rollout("mlra_4", prompts, N_NEW)
    assert len({tuple(row) for row in expected}) == 4
    assert min(len(set(row)) for row in expected) > 6  # a model that repeats itself would prove little
    assert tokens_of(rows, 4) == expected


@pytest.mark.parametrize(
    ("variant", "sizes", "split_heads", "split_tokens"),
    [
        ("mlra_4", (2, 2, 1), False, False),
        ("gqa", (1, 2, 2), True, False),
        ("mla", (1, 2, 1), True, True),
    ],
)
def test_sums_that_are_left_to_the_norm_give_the_same_tokens(
    variant, sizes, split_heads, split_tokens, engine, rollout, prompts, tokens_of, monkeypatch
):
    """What GPUs of one host do, here with `psum` in place of their kernel."""

    def create(mesh, rules, width):
        n = mesh.shape["tensor"]
        arrays = Workspace(np.zeros((n, 64), np.int32), np.zeros((n, 2, n, 64, 2 * width), np.int32))
        return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec("tensor")))

    asked = []
    monkeypatch.setattr(Workspace, "create", create)
    monkeypatch.setattr(transformer, "fitting", lambda workspace, rows: asked.append(rows) or workspace)
    e = engine.__wrapped__(variant, sizes, split_heads, split_tokens)
    rows = e.start(prompts, [N_NEW] * 4)
    assert tokens_of(rows, 4) == rollout(variant, prompts, N_NEW)
    assert asked[-1] == 4 // sizes[0]


@pytest.mark.parametrize(
    ("variant", "sizes", "split_heads"),
    [("mla", (1, 2, 2), False), ("mlra_4", (1, 2, 1), True)],
)
def test_the_devices_of_tensor_may_split_the_tokens_of_the_cache(
    variant, sizes, split_heads, engine, rollout, prompts, tokens_of
):
    e = engine(variant, sizes, split_heads, True)
    rows = e.start(prompts, [N_NEW] * 4)
    assert tokens_of(rows, 4) == rollout(variant, prompts, N_NEW)
    values = e.config.n_layers * 4 * rows.state.cache.capacity * values_per_token(e.config)
    held = sum(a.addressable_data(0).size for a in jax.tree.leaves(rows.state.cache.layers))
    assert held * sizes[1] * sizes[2] == values


def test_it_is_said_why_devices_exchange_by_psum(engine):
    def decode(e):
        one_B = np.ones(1, np.int32)
        with jax.set_mesh(e.mesh):
            cache = jax.eval_shape(lambda: Cache.create(e.config, e.rules, 1, 64))
            call = lambda leaves, cache: e.model(leaves).decode(one_B[None], cache, one_B)
            return explain(call, e.leaves, cache).get("all_reduce_add_rms_norm")

    several, one = engine("mlra_4", (1, 4, 1)), engine("mlra_4")
    reasons = decode(several)
    assert "runs on Hopper GPUs; this is a cpu" in reasons["mosaic_gpu"]
    assert reasons["reference"] is None
    with choose(all_reduce_add_rms_norm="mosaic_gpu"):
        with pytest.raises(NotImplementedError, match="runs on Hopper GPUs"):
            decode(several)
        assert decode(one) is None  # it has nothing to exchange


@pytest.mark.parametrize(
    "variant", ["mla", *(pytest.param(v, marks=pytest.mark.slow) for v in ("gla_2", "gqa"))]
)
def test_fewer_cached_heads_than_devices_are_held_by_several(variant, engine, rollout, prompts, tokens_of):
    rows = engine(variant, (1, 4, 1)).start(prompts, [N_NEW] * 4)
    assert tokens_of(rows, 4) == rollout(variant, prompts, N_NEW)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_each_row_of_a_ragged_batch_equals_its_own_single_run(sampling, engine, prompts, tokens_of):
    e, limits = engine("mlra_4", (1, 4, 1)), [5, 3, 12, 1]
    together = tokens_of(e.start(prompts, limits, sampling=sampling, seed=3), 4)
    alone = [
        tokens_of(e.start([prompt], [limit], sampling=sampling, seed=3, max_len=64), 1)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert together == alone
    assert [len(row) for row in together] == limits


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1)])
def test_step_by_step_equals_the_compiled_loop(sizes, engine, prompts, tokens_of):
    start = lambda: engine("mlra_4", sizes).start(prompts, [4, 12, 2, 9], sampling=SAMPLING, seed=1)
    assert tokens_of(start(), 4, stepwise=True) == tokens_of(start(), 4)


def test_drawn_tokens_do_not_depend_on_the_mesh(engine, prompts, tokens_of):
    drawn = [
        tokens_of(engine("mlra_4", sizes).start(prompts, [N_NEW] * 4, sampling=SAMPLING, seed=1), 4)
        for sizes in [(2, 2, 2), (1, 4, 1)]
    ]
    assert drawn[0] == drawn[1]


def test_samples_are_the_same_whether_the_prompt_is_run_once_or_for_each_of_them(engine, prompts, tokens_of):
    # On a mesh of data=2 one prompt is run for each sample; of four, the rows of the cache are copied.
    e = engine("mlra_4", (2, 2, 2))
    sample = lambda prompts, n: tokens_of(
        e.start(prompts, [6] * len(prompts), n=n, sampling=SAMPLING, seed=9), n * len(prompts)
    )
    copied = sample(prompts, 2)
    for i, prompt in enumerate(prompts):
        repeated = sample([prompt], 4)
        assert copied[2 * i : 2 * i + 2] == repeated[:2]
        assert len({tuple(row) for row in repeated}) == 4


def test_seed_and_limits_change_without_compiling(engine, prompts, tokens_of):
    e = engine("mlra_4", (1, 4, 1))
    first = tokens_of(e.start(prompts, [4, 12, 2, 9], sampling=SAMPLING, seed=1), 4)
    compiled = len(e.programs)
    second = tokens_of(e.start(prompts, [20] * 4, sampling=SAMPLING, seed=2), 4)
    assert len(e.programs) == compiled
    assert [len(row) for row in second] == [20] * 4
    assert first != [row[: len(other)] for row, other in zip(second, first, strict=True)]


def test_rows_end_at_the_end_of_text_id_and_stop_when_told(engine, rollout, prompts, tokens_of):
    e, expected = engine("mlra_4", (1, 4, 1)), rollout("mlra_4", prompts, N_NEW)
    eos = expected[1][4]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert tokens_of(e.start(prompts, [N_NEW] * 4, eos_id=eos), 4) == ended

    rows = e.start(prompts, [N_NEW] * 4)
    rows.stop([0, 3])
    assert [len(row) for row in tokens_of(rows, 4)] == [1, N_NEW, N_NEW, 1]


@pytest.mark.parametrize("at_once", [1, 4])
def test_runs_of_any_length_give_as_many_tokens_however_often_the_host_is_asked(
    at_once, engine, rollout, prompts, monkeypatch
):
    e, expected = engine("mlra_4", (1, 4, 1)), rollout("mlra_4", prompts, N_NEW)
    monkeypatch.setattr(e, "programs", {})
    monkeypatch.setattr(engine_module, "_steps_at_once", lambda: at_once)
    eos = expected[1][4]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    rows = e.start(prompts, [N_NEW] * 4, eos_id=eos)
    made = [[int(token)] for token in np.asarray(rows.first_B)]
    so_far = 1
    for n in (3, 5, 1, 64):
        for row, column in zip(made, np.asarray(rows.run(n)).T, strict=True):
            row += [int(token) for token in column if token != NO_TOKEN]
        so_far += n
        assert made == [row[:so_far] for row in ended]
        left = [0 if len(row) == len(end) else N_NEW - len(row) for row, end in zip(made, ended, strict=True)]
        assert np.asarray(rows.state.left_B).tolist() == left


def test_long_prompts_in_chunks_give_the_same_tokens(engine, rollout, prompts, tokens_of, monkeypatch):
    monkeypatch.setattr(engine_module, "LARGEST_BUCKET", 16)
    e = engine("mlra_4", (2, 2, 2))
    assert tokens_of(e.start(prompts, [N_NEW] * 4), 4) == rollout("mlra_4", prompts, N_NEW)
    sizes = [key[-1] for key in e.programs if key[0] == "prefill"]
    assert 16 in sizes


def test_chunks_cover_the_prompt_in_few_sizes_with_little_padding():
    for longest, largest in itertools.product(
        (1, 16, 17, 500, 513, 1025, 2100, 3000, 32768), (16, 512, 4096)
    ):
        sizes = chunk_sizes(longest, largest)
        assert sum(sizes) >= longest > sum(sizes[:-1])
        assert set(sizes) <= {2**i for i in range(4, 13)}
        assert max(sizes) <= largest
        assert sum(sizes) - longest <= max(512, longest) // 8 or sum(sizes) <= 512
    assert chunk_sizes(32768, 4096) == [4096] * 8


def test_chunks_are_as_large_as_memory_allows():
    config = ModelConfig()  # of the 2.9 B models
    assert largest_chunk(config, 1) == 4096
    for rows in (1, 2, 5, 64):
        chunk = largest_chunk(config, rows)
        assert chunk * rows * engine_module.activation_bytes(config) <= engine_module.PREFILL_BYTES
    assert largest_chunk(config, 10**6) == engine_module.SMALLEST_BUCKET


def test_a_model_in_the_training_layout_is_refused(engine, config_of, params_of):
    model = from_params(config_of("mlra_4"), params_of("mlra_4"))
    with pytest.raises(NotImplementedError, match="cannot decode; convert it with `to_decode`"):
        Engine(model, engine("mlra_4").mesh, 257)


@pytest.mark.parametrize("tokens", [(0, 1), (1, 0)])
def test_empty_prompts_and_no_new_tokens_are_refused(tokens, engine):
    prompt, new = tokens
    with pytest.raises(ValueError, match="at least one"):
        engine("mlra_4", (1, 4, 1)).start([[1] * prompt], [new])


def test_what_does_not_fit_the_cache_is_refused(engine, tokens_of):
    e = engine("mlra_4", (1, 4, 1))
    with pytest.raises(ValueError, match="65 tokens; the cache holds 64"):
        e.start([[1] * 60], [5], max_len=64)


def test_a_row_may_fill_the_cache_to_its_end(engine, rollout, tokens_of):
    prompt = np.arange(52).tolist()
    rows = engine("mlra_4", (1, 4, 1)).start([prompt], [N_NEW], max_len=64)
    assert rows.state.cache.capacity == 64
    assert tokens_of(rows, 1) == rollout("mlra_4", [prompt], N_NEW)


# The cache


@pytest.mark.parametrize(
    ("variant", "sizes", "values"),
    [
        ("mlra_4", (1, 1, 1), 64 + 8),
        ("mlra_4", (1, 4, 1), 64 / 4 + 8),
        ("mlra_4", (1, 4, 2), 64 / 4 + 8),
        ("mlra_4", (2, 2, 2), 64 / 2 + 8),
        ("mlra_2", (1, 4, 1), 64 / 4 + 8),
        ("gla_2", (1, 4, 1), 64 / 2 + 8),
        ("mla", (1, 4, 1), 64 + 8),
        ("gqa", (1, 4, 1), 2 * 16),
    ],
)
def test_each_device_holds_its_share_of_the_cache(variant, sizes, values, config_of):
    data, tensor, context = sizes
    devices = jax.devices()[: data * tensor * context]
    with jax.set_mesh(make_mesh(MeshConfig(data, 1, tensor, context), devices)):
        cache = Cache.create(config_of(variant), decode_rules(), batch=4, max_len=256)
    held = values_held(cache)
    assert held == dict.fromkeys(devices, 2 * (4 // data) * (256 // context) * values)
    assert cache.bytes_per_device() == 4 * max(held.values())


def values_held(cache):
    """Values on each device, read off the arrays' shards."""
    held = {}
    for array in itertools.chain.from_iterable(layer.arrays.values() for layer in cache.layers):
        for shard in array.addressable_shards:
            held[shard.device] = held.get(shard.device, 0) + shard.data.size
    return held


def test_the_shares_stay_as_they_are_during_generation(engine, prompts):
    e = engine("mlra_4", (1, 4, 1))
    rows = e.start(prompts, [N_NEW] * 4)
    rows.step()
    rows.run()
    assert set(values_held(rows.state.cache).values()) == {2 * 4 * LENGTH_UNIT * (64 / 4 + 8)}
    assert e.cache_bytes(4, LENGTH_UNIT) == rows.cache_bytes_per_device == 4 * 2 * 4 * LENGTH_UNIT * 24


def test_the_2_9b_shape_caches_one_and_a_half_head_widths_per_token_on_each_of_four_devices():
    config = ModelConfig(n_layers=1)
    assert config.attention == LatentAttentionConfig(4, 4, 1024, 512, 128, 64)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])):
        cache = Cache.create(config, decode_rules(), 1, 64)
    assert values_held(cache) == dict.fromkeys(jax.devices()[:4], 64 * 192)
    assert 192 == 1.5 * 128


def test_the_cache_is_donated_and_never_copied(engine, prompts):
    e = engine("mlra_4", (1, 4, 1))
    rows = e.start(prompts, [N_NEW] * 4)
    for advance in (rows.step, rows.run):
        before = jax.tree.leaves(rows.state.cache.layers)
        advance()
        assert all(array.is_deleted() for array in before)
    for name in ("prefill", "step", "run"):
        (program, *_) = [p for key, p in e.programs.items() if key[:2] == (name, 4)]
        assert program.memory_analysis().alias_size_in_bytes >= rows.cache_bytes_per_device


def test_a_cache_that_does_not_fit_the_memory_is_refused_before_it_is_allocated(engine, monkeypatch):
    e = engine("mlra_4", (1, 4, 1))
    needed = e.cache_bytes(12, 1024) + e.cache_bytes(4, 1024) + e.activation_bytes(4, 1024)
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: needed)
    e.check_memory(4, 3, 1024)
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"12 row\(s\) of 1024 tokens needs .* GiB on each device"):
        e.check_memory(4, 3, 1024)
