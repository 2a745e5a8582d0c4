"""Model FLOPs of training, and peak FLOP/s of devices.

Model FLOPs utilisation is `tokens_per_second * train_flops_per_token(...) / (devices * peak_flops(kind))`.
"""

from __future__ import annotations

from mlra_jax.config import ModelConfig
from mlra_jax.execution.accelerators import find_accelerator


def train_flops_per_token(config: ModelConfig, n_params: int, seq_len: int) -> float:
    """FLOPs of forward and backward per token: `6 * n_params` plus causal attention.

    Attention is counted as the model is defined (expanded keys and values, exact causal triangle), whatever form or
    kernel computes it: per query head and branch, 2 * (key width + value width) FLOPs for each of the (T + 1) / 2 keys
    that a query sees on average, three times over for forward and backward; and in TPA the products of factors,
    2 * H for each factor of each head. Recomputation is not counted. For the 2.9 B models at T = 2048: 21.8 G (MLRA-4),
    19.5 G (MLRA-2), 19.1 G (MFA), 18.4 G (MLA, GLA), 18.1 G (MHA, MQA, GQA, GTA, TPA).

    Args:
      config: the model.
      n_params: number of parameters, the tied embedding once.
      seq_len: T, tokens per training sequence.
    """
    attention = config.attention.train_flops(config.n_heads, keys=(seq_len + 1) / 2)
    return 6 * n_params + 3 * config.n_layers * attention


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device of this `jax.Device.device_kind`; None if it is not in the table."""
    chip = find_accelerator(device_kind)
    return chip.flops if chip else None
