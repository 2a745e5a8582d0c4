"""Floating-point operations of training, and what devices can do at best.

Model FLOPs utilisation is `tokens_per_second * train_flops_per_token(...) / (devices * peak_flops(kind))`.
"""

from __future__ import annotations

import re

from mlra_jax.config import LatentAttentionConfig, ModelConfig, TensorProductAttentionConfig


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
      seq_len: T, tokens in a training sequence.
    """
    keys_seen = (seq_len + 1) / 2
    match config.attention:
        case LatentAttentionConfig() as a:
            per_head = 2 * a.n_branches * (a.d_nope + a.d_rope + a.d_nope) * keys_seen
        case TensorProductAttentionConfig() as a:
            per_head = 2 * 2 * a.d_head * keys_seen + 2 * (a.q_rank + 2 * a.rank) * a.d_head
        case a:
            per_head = 2 * 2 * a.d_head * keys_seen
    return 6 * n_params + 3 * config.n_layers * config.n_heads * per_head


# Dense bfloat16 matrix FLOP/s of one JAX device, from the vendors' data sheets; the first pattern that matches counts.
# T4 has no bfloat16: the number is its float16 rate. A TPU7x chip (2307 T) is two JAX devices.
_PEAK_TFLOPS = (
    (r"H100 PCIe", 756),
    (r"H100 NVL|H200 NVL", 835),
    (r"H100|H200|GH200", 989),
    (r"A100", 312),
    (r"\bL4\b", 121),
    (r"\bT4\b", 65),
    (r"^TPU v4$", 275),
    (r"^TPU (v5e|v5 lite)$", 197),
    (r"^TPU (v5p|v5)$", 459),
    (r"^TPU (v6e|v6 lite)$", 918),
    (r"^TPU ?7x$", 1153.5),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device of this `jax.Device.device_kind`; None if it is not in the table."""
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_kind):
            return tflops * 1e12
    return None
