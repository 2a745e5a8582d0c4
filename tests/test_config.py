"""Configurations: what is illegal and how it is said, derived sizes, JSON and back."""

import dataclasses
import json
import math
import pathlib
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlra_jax.attention.grouped import GroupedAttentionConfig
from mlra_jax.attention.latent import LatentAttentionConfig
from mlra_jax.attention.registry import BUILT_IN, attention_type
from mlra_jax.attention.tensor_product import TensorProductAttentionConfig
from mlra_jax.attention.tied import TiedAttentionConfig
from mlra_jax.cli.collectives import CollectivesArgs
from mlra_jax.cli.convert import SplitLatentsArgs, ToOfficialArgs
from mlra_jax.cli.describe import DescribeArgs
from mlra_jax.cli.evaluate import EvaluateArgs
from mlra_jax.cli.plot import PlotArgs
from mlra_jax.cli.prepare import PrepareArgs
from mlra_jax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ExecutionConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RotaryScalingConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from mlra_jax.distributed import DistributedConfig
from mlra_jax.generation.generator import GenerationOptions
from mlra_jax.generation.sampling import Sampling


def test_the_defaults_are_legal():
    assert TrainConfig().faults() == []


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LatentAttentionConfig(n_branches=3), ["n_branches=3 does not divide n_latent_heads=4"]),
        (LatentAttentionConfig(kv_lora_rank=510), ["kv_lora_rank=510 is not divisible by n_latent_heads=4"]),
        (LatentAttentionConfig(d_rope=3), ["d_rope=3 must be even"]),
        (LatentAttentionConfig(d_rope=-2), ["d_rope=-2 must be at least 0"]),
        (LatentAttentionConfig(q_lora_rank=0, d_nope=-1), ["q_lora_rank=0 must be", "d_nope=-1 must be"]),
        (
            LatentAttentionConfig(n_branches=3, kv_lora_rank=510, d_rope=3),
            ["n_branches=3", "kv_lora_rank=510", "d_rope=3"],
        ),
        (GroupedAttentionConfig(d_head=7), ["d_head=7 must be even"]),
        (GroupedAttentionConfig(n_kv_heads=0), ["n_kv_heads=0 must be at least 1"]),
        (GroupedAttentionConfig(q_lora_rank=-1), ["q_lora_rank=-1 must be at least 0"]),
        (TiedAttentionConfig(d_head=6), ["d_head=6 must be a multiple of 4"]),
        (TiedAttentionConfig(n_tied_heads=0), ["n_tied_heads=0 must be at least 1"]),
        (TensorProductAttentionConfig(rank=0, q_rank=0), ["rank=0 must be", "q_rank=0 must be"]),
        (TensorProductAttentionConfig(d_head=9), ["d_head=9 must be even"]),
        (
            ModelConfig(n_heads=23, attention=TiedAttentionConfig(6)),
            ["n_heads=23 is not divisible by attention.n_tied_heads=6"],
        ),
        (
            ModelConfig(n_heads=23, attention=LatentAttentionConfig(2, 1)),
            ["n_heads=23 is not divisible by attention.n_latent_heads=2"],
        ),
        (
            ModelConfig(n_heads=23, attention=GroupedAttentionConfig(6)),
            ["n_heads=23 is not divisible by attention.n_kv_heads=6"],
        ),
        (
            ModelConfig(n_heads=23, attention=LatentAttentionConfig(4, 2)),
            ["n_heads=23 is not divisible by the number of head groups n_latent_heads/n_branches=2"],
        ),
        (
            ModelConfig(
                n_layers=0, d_ff=-3, init_std=0.0, rope_base=-1.0, attention=GroupedAttentionConfig(0)
            ),
            ["n_layers=0", "d_ff=-3", "n_kv_heads=0", "init_std=0.0", "rope_base=-1.0 must be more than 0"],
        ),
        (
            RotaryScalingConfig(factor=4.0),
            ["factor=4.0 needs a model.rotary_scaling.method: linear, ntk or yarn"],
        ),
        (
            RotaryScalingConfig("yarn", beta_fast=1, beta_slow=2),
            ["beta_fast=1 must be more than beta_slow=2"],
        ),
        (
            ModelConfig(rotary_scaling=RotaryScalingConfig("yarn", 0.5)),
            ["model.rotary_scaling.factor=0.5 must be at least 1"],
        ),
        (
            ModelConfig(rope_base=1.0, rotary_scaling=RotaryScalingConfig("yarn")),
            ["rope_base=1.0 must be more than 1"],
        ),
        (MeshConfig(data=0), ["mesh.data=0 must be at least 1 (or -1)"]),
        (
            ModelConfig(output_init="zero"),
            ["output_init='zero' must be one of zeros, normal. Did you mean zeros?"],
        ),
        (DataConfig(order=3), ["data.order=3 must be one of shuffled, sequential, official"]),
        (
            TrainConfig(steps="40", seed=True, out=pathlib.Path("x"), optim=OptimConfig(beta1=None)),
            [
                "out=PosixPath('x') must be a text, not PosixPath",
                "optim.beta1=None must be a number, not NoneType",
                "steps='40' must be a whole number, not str",
                "seed=True must be a whole number, not bool",
            ],
        ),
        (ModelConfig(attention=MeshConfig()), ["must be AttentionConfig, not MeshConfig"]),
        (MeshConfig(data=-1, tensor=-1), ["At most one mesh size may be -1"]),
        (DataConfig(seq_len=0, prefetch=0), ["seq_len=0", "prefetch=0"]),
        (
            DataConfig(order="official", global_batch=12),
            ["global_batch=12 is not divisible by official_ranks=8"],
        ),
        (OptimConfig(lr=0.0), ["lr=0.0"]),
        (OptimConfig(lr=1e-4, min_lr=1e-3), ["min_lr=0.001"]),
        (
            OptimConfig(warmup_steps=-1, decay_steps=0),
            ["warmup_steps=-1 must be at least 0", "decay_steps=0 must be at least 1"],
        ),
        (OptimConfig(beta1=1.0, beta2=-0.1, eps=0.0), ["beta1=1.0", "beta2=-0.1", "eps=0.0"]),
        (OptimConfig(lr=math.inf), ["lr=inf"]),
        (OptimConfig(lr=math.nan), ["lr=nan"]),
        (OptimConfig(weight_decay=math.inf), ["weight_decay=inf"]),
        (OptimConfig(weight_decay=math.nan), ["weight_decay=nan"]),
        (OptimConfig(clip_norm=math.nan), ["clip_norm=nan"]),
        (ModelConfig(init_std=math.inf), ["init_std=inf must be more than 0 and finite"]),
        (ModelConfig(init_std=math.nan), ["init_std=nan must be more than 0 and finite"]),
        (TrainConfig(seed=-1), ["seed=-1 must be at least 0 and less than 4294967296"]),
        (TrainConfig(seed=2**32), ["seed=4294967296 must be at least 0 and less than"]),
        (CheckpointConfig(every=0, keep_every=-1), ["every=0", "keep_every=-1 must be at least 0"]),
        (LogConfig(every=0, profile_steps=-1), ["every=0", "profile_steps=-1 must be at least 0"]),
    ],
    ids=lambda x: type(x).__name__ if dataclasses.is_dataclass(x) else "",
)
def test_every_fault_is_said_in_one_sentence(config, said):
    faults = config.faults()
    assert len(faults) == len(said)
    for fault, part in zip(faults, said, strict=True):
        assert part in fault
        assert fault[-1] in ".?"
        assert "\n" not in fault
    with pytest.raises(ConfigError) as error:
        config.validate()
    assert error.value.faults == faults
    assert all(fault in str(error.value) for fault in faults)


def test_a_training_configuration_lists_the_faults_of_all_its_parts():
    config = TrainConfig(
        model=ModelConfig(n_layers=0), data=DataConfig(seq_len=0), mesh=MeshConfig(data=0), steps=0
    )
    faults = config.faults()
    assert len(faults) == 4
    with pytest.raises(ConfigError, match="4 faults in the configuration"):
        config.validate()


@pytest.mark.parametrize(
    ("attention", "n_heads", "groups", "per_latent", "d_latent"),
    [
        (LatentAttentionConfig(4, 4, kv_lora_rank=512), 24, 1, 24, 128),
        (LatentAttentionConfig(4, 2, kv_lora_rank=512), 24, 2, 12, 128),
        (LatentAttentionConfig(4, 1, kv_lora_rank=512), 24, 4, 6, 128),
        (LatentAttentionConfig(1, 1, kv_lora_rank=512), 24, 1, 24, 512),
    ],
)
def test_derived_sizes(attention, n_heads, groups, per_latent, d_latent):
    assert (attention.n_groups, attention.d_latent) == (groups, d_latent)
    assert ModelConfig(n_heads=n_heads, attention=attention).heads_per_latent == per_latent
    for grouped in (GroupedAttentionConfig(6), TiedAttentionConfig(6)):
        assert ModelConfig(n_heads=24, attention=grouped).heads_per_latent == 4
    tpa = ModelConfig(n_heads=24, attention=TensorProductAttentionConfig())
    assert (tpa.cached_heads, tpa.heads_per_latent) == (24, 1)


@given(known=st.tuples(*[st.integers(1, 4)] * 3), rest=st.integers(1, 4), free=st.integers(0, 3))
def test_a_free_mesh_size_takes_the_devices_that_are_left(known, rest, free):
    sizes = [*known[:free], rest, *known[free:]]
    n_devices = sizes[0] * sizes[1] * sizes[2] * sizes[3]
    asked = [-1 if i == free else size for i, size in enumerate(sizes)]
    assert MeshConfig(*asked).resolve(n_devices) == MeshConfig(*sizes)
    assert MeshConfig(*sizes).resolve(n_devices) == MeshConfig(*sizes)
    with pytest.raises(ConfigError, match=f"the product must be {n_devices + 1}"):
        MeshConfig(*sizes).resolve(n_devices + 1)


def test_accumulation_is_derived_from_the_global_batch():
    data = DataConfig(global_batch=480, micro_batch=2)
    assert [data.accumulation(n) for n in (1, 8, 240)] == [240, 30, 1]
    with pytest.raises(ConfigError, match="not a multiple of micro_batch=2 x 7"):
        data.accumulation(7)


@pytest.mark.parametrize(
    "attention",
    [
        LatentAttentionConfig(8, 2),
        GroupedAttentionConfig(2, 64),
        GroupedAttentionConfig(1, 64, q_lora_rank=32),
        TiedAttentionConfig(2, 64),
        TensorProductAttentionConfig(3, 4, 64),
    ],
)
def test_json_gives_the_configuration_back(attention):
    config = TrainConfig(
        name="x",
        model=ModelConfig(n_heads=8, attention=attention, rotary_scaling=RotaryScalingConfig("linear", 2.0)),
        mesh=MeshConfig(1, 2, 3, 4),
        optim=OptimConfig(lr=1e-3),
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_fields_that_a_stored_configuration_lacks_take_their_defaults():
    stored = to_dict(TrainConfig(seed=7))
    del stored["steps"], stored["execution"], stored["log"], stored["model"]["rotary_scaling"]
    assert from_dict(stored) == TrainConfig(seed=7)
    stored["model"]["attention"] = {"n_kv_heads": 6, "d_head": 128}  # as before there were low-rank queries
    assert from_dict(stored).model.attention == GroupedAttentionConfig(6, 128)


def test_stored_fields_that_are_unknown_or_illegal_are_refused_all_at_once():
    stored = to_dict(TrainConfig())
    stored |= {"stepz": 1, "data": 3, "steps": "40"}
    stored["model"]["depth"] = 2
    stored["model"]["attention"]["n_kv_heads"] = 3
    stored["optim"]["lr"] = math.nan
    with pytest.raises(ConfigError) as error:
        from_dict(stored)
    assert error.value.faults == [
        "Unknown field model.attention.n_kv_heads. Did you mean n_latent_heads?",
        "Unknown field model.depth.",
        "Unknown field stepz. Did you mean steps?",
        "data=3 must be DataConfig, not int.",
        "optim.lr=nan must be more than 0 and finite.",
        "steps='40' must be a whole number, not str.",
    ]
    with pytest.raises(ConfigError, match=r"The configuration=\[\] must be TrainConfig, not list"):
        from_dict([])


def test_what_a_run_chose_for_its_devices_is_left_out_if_asked():
    execution = ExecutionConfig("expanded", remat="dots", gather="step")
    stored = TrainConfig(execution=execution, data=DataConfig(micro_batch=3, seq_len=64))
    assert from_dict(to_dict(stored)) == stored
    assert from_dict(to_dict(stored), afresh=True) == TrainConfig(data=DataConfig(seq_len=64))


COMMANDS = [
    *(CollectivesArgs, DescribeArgs, EvaluateArgs, PlotArgs, PrepareArgs, SplitLatentsArgs, ToOfficialArgs),
    *(DistributedConfig, GenerationOptions, Sampling),
]
PARTS = [
    *(
        ModelConfig,
        ExecutionConfig,
        MeshConfig,
        DataConfig,
        OptimConfig,
        RotaryScalingConfig,
        CheckpointConfig,
        LogConfig,
        TrainConfig,
    ),
    *map(attention_type, BUILT_IN),
]


@pytest.mark.parametrize("cls", [*PARTS, *COMMANDS], ids=lambda cls: cls.__name__)
def test_every_field_refuses_another_type_a_misspelt_choice_and_an_impossible_number(cls):
    needed = {f.name: ("x",) if f.name == "runs" else "x" for f in dataclasses.fields(cls)}
    legal = cls(**{f.name: needed[f.name] for f in dataclasses.fields(cls) if f.default is f.default_factory})
    assert legal.faults() == []
    hints = get_type_hints(cls)
    for name in (f.name for f in dataclasses.fields(cls)):
        kinds = get_args(hints[name]) or (hints[name],)
        wrong = [object(), 3 if str in kinds or bool in kinds else "misspelt"]
        if int in kinds or float in kinds:
            wrong += [True, -math.inf, math.nan, *([-(10**6)] if name != "key_scale" else [])]
        for value in wrong:
            (fault,) = dataclasses.replace(legal, **{name: value}).faults()
            assert name in fault.replace("-", "_")
