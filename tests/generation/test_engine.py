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
from mlra_jax.generation.engine import NO_TOKEN, Engine, Request, Rows, chunk_shapes, next_chunk
from mlra_jax.generation.loop import GenerationLoop
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
    expected = rollout("mlra_4", prompts, N_NEW)
    assert len({tuple(row) for row in expected}) == 4
    assert min(len(set(row)) for row in expected) > 6  # a model that repeats itself would prove little
    assert tokens_of(engine("mlra_4", sizes, split_heads), prompts, [N_NEW] * 4) == expected


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
    assert tokens_of(e, prompts, [N_NEW] * 4) == rollout(variant, prompts, N_NEW)
    assert asked[-1] == 4 // sizes[0]


@pytest.mark.parametrize(
    ("variant", "sizes", "split_heads"),
    [("mla", (1, 2, 2), False), ("mlra_4", (1, 2, 1), True)],
)
def test_the_devices_of_tensor_may_split_the_tokens_of_the_cache(
    variant, sizes, split_heads, engine, rollout, prompts, tokens_of
):
    e = engine(variant, sizes, split_heads, True)
    loop = GenerationLoop(e, 4, 64)
    assert tokens_of(loop, prompts, [N_NEW] * 4) == rollout(variant, prompts, N_NEW)
    rows = loop.rows
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
    made = tokens_of(engine(variant, (1, 4, 1)), prompts, [N_NEW] * 4)
    assert made == rollout(variant, prompts, N_NEW)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLING])
def test_each_row_of_a_ragged_batch_equals_its_own_single_run(sampling, engine, prompts, tokens_of):
    e, limits = engine("mlra_4", (1, 4, 1)), [5, 3, 12, 1]
    together = tokens_of(e, prompts, limits, sampling=sampling, seed=3)
    alone = [
        tokens_of(e, [prompt], [limit], rows=1, sampling=sampling, seed=3)[0]
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    assert together == alone
    assert [len(row) for row in together] == limits


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 4, 1)])
def test_step_by_step_equals_the_compiled_loop(sizes, engine, prompts, tokens_of):
    args = engine("mlra_4", sizes), prompts, [4, 12, 2, 9]
    made = [tokens_of(*args, sampling=SAMPLING, seed=1, stepwise=stepwise) for stepwise in (True, False)]
    assert made[0] == made[1]


def test_drawn_tokens_do_not_depend_on_the_mesh(engine, prompts, tokens_of):
    drawn = [
        tokens_of(engine("mlra_4", sizes), prompts, [N_NEW] * 4, sampling=SAMPLING, seed=1)
        for sizes in [(2, 2, 2), (1, 4, 1)]
    ]
    assert drawn[0] == drawn[1]


def test_seed_and_limits_change_without_compiling(engine, prompts, tokens_of):
    e = engine("mlra_4", (1, 4, 1))
    first = tokens_of(e, prompts, [4, 12, 2, 9], sampling=SAMPLING, seed=1)
    compiled = len(e.programs)
    second = tokens_of(e, prompts, [20] * 4, sampling=SAMPLING, seed=2)
    assert len(e.programs) == compiled
    assert [len(row) for row in second] == [20] * 4
    assert first != [row[: len(other)] for row, other in zip(second, first, strict=True)]


def begun(e, prompts, eos_id=None):
    """Rows that have their first token, and these tokens."""
    rows = Rows(e, len(prompts), 64)
    rows.fill({i: (0, prompt) for i, prompt in enumerate(prompts)}, rows.part_rows, 64)
    first = rows.begin({i: Request(p, N_NEW, eos_id=eos_id) for i, p in enumerate(prompts)})
    return rows, np.asarray(first.id_B).tolist()


@pytest.mark.parametrize("at_once", [1, 4])
def test_runs_of_any_length_give_as_many_tokens_however_often_the_host_is_asked(
    at_once, engine, rollout, prompts, monkeypatch
):
    e, expected = engine("mlra_4", (1, 4, 1)), rollout("mlra_4", prompts, N_NEW)
    monkeypatch.setattr(e, "programs", {})
    monkeypatch.setattr(engine_module, "_steps_at_once", lambda: at_once)
    eos = expected[1][4]
    ended = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    rows, first = begun(e, prompts, eos)
    made = [[token] for token in first]
    so_far = 1
    for n in (3, 5, 1, 64):
        for row, column in zip(made, np.asarray(rows.run(n).id_B).T, strict=True):
            row += [int(token) for token in column if token != NO_TOKEN]
        so_far += n
        assert made == [row[:so_far] for row in ended]
        left = [0 if len(row) == len(end) else N_NEW - len(row) for row, end in zip(made, ended, strict=True)]
        assert np.asarray(rows.state.left_B).tolist() == left


def test_long_prompts_in_chunks_give_the_same_tokens(engine, rollout, prompts, tokens_of, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK_SIZES", (16,))
    e = engine("mlra_4", (2, 2, 2))
    assert tokens_of(e, prompts, [N_NEW] * 4) == rollout("mlra_4", prompts, N_NEW)


def test_chunks_run_prompts_of_any_length_in_few_shapes_with_little_padding():
    config = ModelConfig()  # of the 2.9 B models
    for rows, max_len in itertools.product((1, 2, 8, 64), (64, 4096, 2**17)):
        shapes = chunk_shapes(config, rows, max_len)
        assert {n for n, _ in shapes} <= {1, 4, 16, rows}
        assert {size for _, size in shapes} <= set(engine_module.CHUNK_SIZES)
        bytes_of = lambda n, size: n * size * engine_module.activation_bytes(config)
        assert all(bytes_of(*shape) <= engine_module.PREFILL_BYTES for shape in shapes if shape[1] > 16)
        assert len(shapes) <= 14

    def positions(lengths, rows):
        left, done = list(lengths), 0
        while any(left):
            n, size = next_chunk([left], chunk_shapes(config, rows, 2**17))
            for i in sorted(range(len(left)), key=lambda i: -min(left[i], size))[:n]:
                left[i] -= min(left[i], size)
            done += max(n * size, engine_module.SMALL_CHUNK)
        return done

    for n in (1, 16, 17, 255, 513, 1025, 2100, 3000, 32768):
        assert positions([n], 1) <= max(256, n + 320)
    assert positions([32768], 1) == 32768
    lengths = np.random.default_rng(0).integers(16, 1024, 64)
    assert positions(lengths, 64) < 1.25 * lengths.sum()
    assert positions(lengths[:4], 64) < 1.5 * lengths[:4].sum()


def test_a_model_in_the_training_layout_is_refused(engine, config_of, params_of):
    model = from_params(config_of("mlra_4"), params_of("mlra_4"))
    with pytest.raises(NotImplementedError, match="cannot decode; convert it with `to_decode`"):
        Engine(model, engine("mlra_4").mesh, 257)


def test_a_row_may_fill_the_cache_to_its_end(engine, rollout, tokens_of):
    prompt = np.arange(52).tolist()
    loop = GenerationLoop(engine("mlra_4", (1, 4, 1)), 1, 64)
    assert loop.rows.state.cache.capacity == 64
    assert tokens_of(loop, [prompt], [N_NEW]) == rollout("mlra_4", [prompt], N_NEW)


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
    rows, _ = begun(e, prompts)
    rows.step()
    rows.run()
    assert set(values_held(rows.state.cache).values()) == {2 * 4 * 64 * (64 / 4 + 8)}
    assert e.cache_bytes(4, 64) == rows.cache_bytes_per_device == 4 * 2 * 4 * 64 * 24


def test_rows_of_the_cache_are_taken_put_and_repeated_on_their_own_device(config_of):
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1, 1), jax.devices()[:2])):
        rules = decode_rules()
        cache = Cache.create(config_of("mlra_4"), rules, batch=4, max_len=64)
        number = lambda x: x + np.arange(4, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        number = jax.jit(number, out_shardings=None)
        cache = jax.tree.map(lambda x: rules.constrain(number(x), "batch"), cache)
        rows = lambda *local: rules.constrain(np.array(local, np.int32), "batch")
        part = jax.jit(Cache.take)(cache, rows(1, 0), rows(7, 8))
        put = jax.jit(Cache.put)(cache, rows(0, 2), part)  # the second device has no third row: dropped
        for made, content, lengths in [
            (part, [1, 2], [7, 8]),
            (put, [1, 1, 2, 3], [7, 1, 2, 3]),
            (
                jax.jit(Cache.repeat, static_argnums=1)(cache, 2),
                [0, 0, 1, 1, 2, 2, 3, 3],
                [0, 0, 1, 1, 2, 2, 3, 3],
            ),
        ]:
            assert np.asarray(made.lengths).tolist() == lengths
            for array in jax.tree.leaves(made.layers):
                assert np.asarray(array).reshape(len(content), -1)[:, [0, -1]].tolist() == [
                    [i, i] for i in content
                ]


def test_the_2_9b_shape_caches_one_and_a_half_head_widths_per_token_on_each_of_four_devices():
    config = ModelConfig(n_layers=1)
    assert config.attention == LatentAttentionConfig(4, 4, 1024, 512, 128, 64)
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 4, 1), jax.devices()[:4])):
        cache = Cache.create(config, decode_rules(), 1, 64)
    assert values_held(cache) == dict.fromkeys(jax.devices()[:4], 64 * 192)
    assert 192 == 1.5 * 128


def test_the_cache_is_donated_and_never_copied(engine, prompts):
    e = engine("mlra_4", (1, 4, 1))
    rows, _ = begun(e, prompts)
    fill = lambda: rows.fill({2: (0, [1, 2])}, 1, 16)  # one of four rows
    copy = lambda: rows.copy({1: (2, 2)})
    for advance in (rows.step, rows.run, fill, copy):
        before = jax.tree.leaves(rows.state.cache.layers)
        advance()
        assert all(array.is_deleted() for array in before)
    for name in ("prefill", "copy", "step", "run"):
        (program, *_) = [p for key, p in e.programs.items() if key[:3] == (name, 4, 64)]
        assert program.memory_analysis().alias_size_in_bytes >= rows.cache_bytes_per_device


def test_a_cache_that_does_not_fit_the_memory_is_refused_before_it_is_allocated(engine, monkeypatch):
    e = engine("mlra_4", (1, 4, 1))
    needed = e.cache_bytes(12, 1024) + e.filling_bytes(12, 1024)
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: needed)
    e.check_memory(12, 1024)
    monkeypatch.setattr(engine_module, "free_bytes", lambda device: needed - 1)
    with pytest.raises(ConfigError, match=r"12 row\(s\) of 1024 tokens needs .* GiB on each device"):
        GenerationLoop(e, 12, 1024)
