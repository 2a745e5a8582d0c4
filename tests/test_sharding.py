"""The mesh, the tables of logical axes, and what is refused before anything is allocated."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.config import ConfigError, DataConfig, ExecutionConfig, MeshConfig, ModelConfig, TrainConfig
from mlra_jax.execution import topologies
from mlra_jax.sharding import (
    TRAIN_RULES,
    ZIGZAG_RULES,
    AxisRules,
    check_decode_layout,
    check_train_layout,
    decode_rules,
    make_mesh,
)

RULES = AxisRules.of(rows=("a", "b"), columns="c", absent="z", whole=None)


def mesh(kind=AxisType.Explicit):
    return jax.make_mesh((2, 2, 2), ("a", "b", "c"), (kind,) * 3)


def test_mesh_has_four_explicit_axes_in_order():
    made = make_mesh(MeshConfig(data=2, fsdp=1, tensor=-1, context=2), jax.devices()[:8])
    assert dict(made.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "context": 2}
    assert set(made.axis_types) == {AxisType.Explicit}


def test_mesh_that_does_not_use_all_devices_is_refused():
    with pytest.raises(ConfigError, match=r"tensor=3 .* on 8 device"):
        make_mesh(MeshConfig(data=1, tensor=3), jax.devices()[:8])


def test_tables_are_equal_and_hash_alike_however_they_are_written():
    same = AxisRules.of(whole=(), columns=("c",), rows=("a", "b"), absent="z")
    assert same == RULES
    assert hash(same) == hash(RULES)


def test_names_become_the_mesh_axes_that_exist():
    with jax.set_mesh(mesh()):
        assert RULES.spec("rows", None, "columns", "absent", "whole", "unknown") == P(
            ("a", "b"), None, "c", None, None, None
        )
        assert [RULES.size(name) for name in ("rows", "columns", "absent", "unknown")] == [4, 2, 1, 1]
        assert RULES.fitting("rows", 8) == "rows"
        assert RULES.fitting("rows", 6) is None
    assert RULES.spec("rows", "columns") == P(None, None)
    assert RULES.size("rows") == 1


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("compiled", [True, False])
def test_constraint_product_and_map_work_on_explicit_and_auto_meshes(kind, compiled):
    x, w = np.arange(32.0).reshape(8, 4), np.arange(8.0).reshape(4, 2)
    jit = jax.jit if compiled else lambda f: f
    with jax.set_mesh(mesh(kind)):
        placed = jit(lambda x: RULES.constrain(x, "rows", "columns"))(jnp.asarray(x))
        product = jit(lambda x, w: RULES.einsum("ij,jk->ik", x, w, out=("rows", None)))(
            placed, jnp.asarray(w)
        )
        local = lambda x: (RULES.psum(x.sum(), "rows"), RULES.axis_index("rows") * jnp.ones(1))
        mapped = jit(RULES.shard_map(local, (("rows", None),), ((), ("rows",))))
        total, indices = mapped(placed)
    assert placed.sharding.spec == P(("a", "b"), "c")
    assert placed.addressable_shards[0].data.shape == (2, 2)
    assert product.addressable_shards[0].data.shape == (2, 2)
    np.testing.assert_array_equal(product, x @ w)
    assert float(total) == x.sum()
    assert indices.tolist() == [0, 1, 2, 3]


def test_without_a_mesh_everything_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert RULES.constrain(x, "rows", "columns") is x
    f = lambda x: RULES.psum(x, "rows") + RULES.axis_index("rows")
    assert RULES.shard_map(f, (("rows", None),), ("rows", None)) is f
    np.testing.assert_array_equal(f(x), x)


MODEL = ModelConfig(
    vocab_size=96, n_layers=1, d_model=48, n_heads=8, d_ff=80, attention=LatentAttentionConfig(4, 4)
)
GROUPED = dataclasses.replace(MODEL, n_heads=12, attention=GroupedAttentionConfig(3, 16))
TENSOR_PRODUCT = dataclasses.replace(MODEL, n_heads=12, attention=TensorProductAttentionConfig())
TRAIN = TrainConfig(model=MODEL, data=DataConfig(seq_len=64, global_batch=16, micro_batch=2))


def faults_of(check, *args):
    with pytest.raises(ConfigError) as error:
        check(*args)
    return error.value.faults


@dataclasses.dataclass(frozen=True)
class SlicedDevice:
    """What the layout of a mesh looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("sizes", "slices_along"),
    [((2, 2, 2, 1), 0), ((4, 1, 2, 1), 0), ((1, 8, 1, 1), 1), ((1, 2, 4, 1), 1), ((2, 1, 1, 4), 0)],
    ids=str,
)
def test_slices_lie_along_data_then_fsdp_and_the_other_axes_stay_inside_one(sizes, slices_along):
    devices = [SlicedDevice(i, i // 4) for i in range(8)]
    laid_out = make_mesh(MeshConfig(*sizes), devices).devices
    slices = np.vectorize(lambda device: device.slice_index)(laid_out)
    assert slices.shape == sizes
    half = np.split(slices, 2, axis=slices_along)
    assert [set(part.ravel()) for part in half] == [{0}, {1}]


def test_a_mesh_whose_tensor_axis_would_cross_slices_is_refused():
    with pytest.raises(ConfigError, match=r"data=1 x mesh\.fsdp=1 .* 2 slices .* --mesh\.data 2"):
        make_mesh(MeshConfig(1, 1, 8, 1), [SlicedDevice(i, i // 4) for i in range(8)])


def test_training_layouts_that_divide_are_taken():
    for sizes in ((8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (2, 2, 2, 1), (1, 1, 2, 4)):
        check_train_layout(TRAIN, MeshConfig(*sizes))


def test_the_example_of_docs_tpu_lays_out_on_its_topology(repository, monkeypatch):
    example, *_ = re.findall(r"```python\n(.*?)```", (repository / "docs" / "tpu.md").read_text(), re.DOTALL)
    numbers = []

    def check(config, topology):
        numbers.append(math.prod(map(int, topology.split(":")[1].split("x"))))
        check_train_layout(config, config.mesh.resolve(numbers[-1]))

    monkeypatch.setattr(topologies, "compile_train_step", check)
    monkeypatch.setattr(topologies.Memory, "of", lambda compiled: compiled)
    exec(example, {})
    assert numbers == [16]


def test_training_layout_is_refused_with_every_size_that_does_not_divide_and_what_would():
    assert faults_of(check_train_layout, TRAIN, MeshConfig(1, 5, 3, 7)) == [
        "model.n_heads=8 is not divisible by mesh axis tensor=3; use --mesh.tensor 1, 2, 4, 8.",
        "model.d_ff=80 is not divisible by mesh axis tensor=3; use --mesh.tensor 1, 2, 4, 5, 8, 10, 16, 20, 40.",
        "model.d_model=48 is not divisible by mesh axis fsdp=5; use --mesh.fsdp 1, 2, 3, 4, 6, 8, 12, 16, 24, 48.",
        "data.seq_len=64 is not divisible by twice mesh axis context=7, whose devices take two runs of tokens each; "
        "use --mesh.context 1, 2, 4, 8, 16, 32.",
        "data.global_batch=16 is not a multiple of micro_batch=2 x 5 data-parallel devices (data x fsdp) = 10; "
        "change one of them.",
    ]


def test_weights_are_not_gathered_once_a_step_where_heads_or_tokens_are_split():
    once = dataclasses.replace(TRAIN, execution=ExecutionConfig(gather="step"))
    check_train_layout(once, MeshConfig(2, 2, 1, 1))
    assert faults_of(check_train_layout, once, MeshConfig(1, 2, 2, 1)) == [
        "execution.gather=step needs mesh.tensor and mesh.context of 1, not 2 and 1; use --execution.gather layer."
    ]


@pytest.mark.parametrize(
    ("model", "tensor", "fits"),
    [
        *((MODEL, t, True) for t in (1, 2, 4, 8, 16)),
        *((MODEL, t, False) for t in (3, 5, 6, 12)),
        *((GROUPED, t, True) for t in (1, 3, 6, 12)),
        *((GROUPED, t, False) for t in (2, 4, 5, 9)),
        *((TENSOR_PRODUCT, t, True) for t in (1, 2, 12)),
        *((TENSOR_PRODUCT, t, False) for t in (5, 24)),
    ],
    ids=lambda x: x if isinstance(x, int | bool) else "",
)
def test_decoding_takes_tensor_sizes_that_divide_the_cached_heads_or_share_out_their_queries(
    model, tensor, fits
):
    mesh = MeshConfig(data=1, tensor=tensor)
    widths = dataclasses.replace(model, d_ff=720, vocab_size=720)  # divisible by all of them
    if fits:
        check_decode_layout(widths, mesh, split_heads=False)
    else:
        (fault,) = faults_of(check_decode_layout, widths, mesh, False)
        assert f"tensor={tensor}; use --mesh.tensor" in fault


def test_decoding_layout_is_refused_with_every_fault_and_what_would_fit():
    assert faults_of(check_decode_layout, MODEL, MeshConfig(1, 2, 3, 1)) == [
        "model.attention.n_latent_heads=4 (each read by 8 query heads) cannot be laid out on mesh axis tensor=3; use "
        "--mesh.tensor 1, 2, 4, 8, 16, 32 and --mesh.context for more devices.",
        "model.n_heads=8 is not divisible by mesh axis tensor=3; use --mesh.tensor 1, 2, 4, 8.",
        "model.d_ff=80 is not divisible by mesh axis tensor=3; use --mesh.tensor 1, 2, 4, 5, 8, 10, 16, 20, 40.",
        "mesh.fsdp=2: decoding does not split parameters over fsdp; use --mesh.data, --mesh.tensor or --mesh.context.",
    ]
    assert (
        "n_kv_heads=3 (each read by 4 query heads)"
        in faults_of(check_decode_layout, GROUPED, MeshConfig(1, 1, 2))[0]
    )
    assert faults_of(check_decode_layout, TENSOR_PRODUCT, MeshConfig(1, 1, 8)) == [
        "model.n_heads=12 (each read by 1 query head) cannot be laid out on mesh axis tensor=8; use --mesh.tensor "
        "1, 2, 3, 4, 6, 12 and --mesh.context for more devices."
    ]


def test_whole_query_heads_need_not_divide():
    widths = dataclasses.replace(MODEL, d_ff=96)
    check_decode_layout(widths, MeshConfig(1, 1, 16), split_heads=False)
    assert len(faults_of(check_decode_layout, widths, MeshConfig(1, 1, 16), True)) == 1


def test_the_two_tables_split_query_heads_in_training_and_latent_heads_in_decoding():
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 8, 1), jax.devices()[:8])):
        assert TRAIN_RULES.spec("heads", "kv_head_shards") == P("tensor", None)
        assert decode_rules().spec("heads", "kv_head_shards") == P("tensor", "tensor")
        assert decode_rules(split_heads=False).spec("heads", "kv_head_shards") == P(None, "tensor")


def test_zigzag_order_is_as_much_causal_work_on_each_device_and_loses_no_token():
    x = jnp.arange(2 * 24).reshape(2, 24)
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 1, 4), jax.devices()[:8])):
        ordered = ZIGZAG_RULES.in_order(x, 1)
        held = {shard.device.id: np.asarray(shard.data)[0] for shard in ordered.addressable_shards}
        gather = ZIGZAG_RULES.shard_map(
            ZIGZAG_RULES.all_tokens, (("batch", "length"),), ("batch", None), check_vma=False
        )
        np.testing.assert_array_equal(gather(ordered), x)

        def from_runs(positions):
            runs = ZIGZAG_RULES.runs(len(positions))
            return jnp.concatenate([start + jnp.arange(positions[at].size) for start, at in runs])

        positions = ZIGZAG_RULES.positions(24)
        found = ZIGZAG_RULES.shard_map(from_runs, (("length",),), ("length",))(positions)
        np.testing.assert_array_equal(found, positions)
    assert {ids[ids < 24].sum() for ids in held.values() if ids[0] < 24} == {24 * 23 // 2 // 4}
    np.testing.assert_array_equal(ZIGZAG_RULES.in_order(x, 1), x)  # nothing is split


def test_the_name_that_earlier_versions_had_for_shards_of_kv_heads_still_works():
    with pytest.warns(DeprecationWarning, match="latent_slots is called kv_head_shards now"):
        assert AxisRules.of(latent_slots="model") == AxisRules.of(kv_head_shards="model")
