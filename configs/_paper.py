"""What the paper's 2.9 B runs have in common: their shape, and the recipe of the official PyTorch code.

100,001 AdamW updates of 480 sequences of 2048 tokens (983,040 tokens each, 98.3 B in all) of FineWeb-Edu, in the
order in which the official code's eight processes read it. `mlra-prepare` writes shards; the official ones do as well.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import mlra_jax as mlra

GetConfig = Callable[[], mlra.TrainConfig]


def paper_config(name: str, *, attention: mlra.AttentionConfig, d_ff: int) -> GetConfig:
    """The run `name`: 24 layers 3072 wide with 24 query heads; `d_ff` brings each variant to 2.87 B parameters."""
    return lambda: mlra.TrainConfig(
        name=name,
        model=mlra.ModelConfig(
            vocab_size=50304, n_layers=24, d_model=3072, n_heads=24, d_ff=d_ff, attention=attention
        ),
        data=mlra.DataConfig(
            path="data/fineweb_edu",
            tokenizer="gpt2",
            seq_len=2048,
            global_batch=480,
            micro_batch=0,
            order="official",
            official_ranks=8,
        ),
        optim=mlra.OptimConfig(
            lr=1.6e-4,
            min_lr=1.6e-5,
            warmup_steps=2000,
            decay_steps=100_000,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        mesh=mlra.MeshConfig(data=1, fsdp=-1),
        checkpoint=mlra.CheckpointConfig(every=1000, keep=2, keep_every=5000),
        log=mlra.LogConfig(every=10, eval_every=1000, eval_sequences=200),
        steps=100_001,
        seed=5000,
    )


def latent(n_latent_heads: int, *, n_branches: int, q_lora_rank: int) -> mlra.LatentAttentionConfig:
    """Latent attention as the paper has it: latents 512 wide in all, heads of 128, and 64 that rotate."""
    return mlra.LatentAttentionConfig(
        n_latent_heads, n_branches, q_lora_rank=q_lora_rank, kv_lora_rank=512, d_nope=128, d_rope=64
    )


def grouped(n_kv_heads: int, *, d_head: int = 128, q_lora_rank: int = 0) -> mlra.GroupedAttentionConfig:
    """Attention with key-value heads."""
    return mlra.GroupedAttentionConfig(n_kv_heads, d_head, q_lora_rank=q_lora_rank)


def _changed(base: GetConfig, suffix: str, change: Callable[[mlra.ModelConfig], dict[str, Any]]) -> GetConfig:
    """The run `base` with some fields of its model changed, named after it."""

    def get_config() -> mlra.TrainConfig:
        config = base()
        model = dataclasses.replace(config.model, **change(config.model))
        return dataclasses.replace(config, name=f"{config.name}_{suffix}", model=model)

    return get_config


def gated(base: GetConfig) -> GetConfig:
    """With a sigmoid gate on the heads' output; the MLP gives up 1024 of its width for the gate's parameters."""
    return _changed(base, "gated", lambda m: {"gated_attention": True, "d_ff": m.d_ff - 1024})


def no_scale(base: GetConfig) -> GetConfig:
    """Without the scales of latent attention: the paper's ablation of them."""
    unscaled = lambda a: dataclasses.replace(a, scale_latents=False)
    return _changed(base, "no_scale", lambda m: {"attention": unscaled(m.attention)})


def double_heads(base: GetConfig, *, d_ff: int) -> GetConfig:
    """With twice the query heads, and the same latent or KV heads; `d_ff` keeps the number of parameters."""
    return _changed(base, "double_heads", lambda m: {"n_heads": 2 * m.n_heads, "d_ff": d_ff})


def normal_initialization(base: GetConfig) -> GetConfig:
    """With output projections that start from N(0, 0.02) in place of zero: the paper's ablation of that."""
    return _changed(base, "normal_initialization", lambda m: {"output_init": "normal"})
