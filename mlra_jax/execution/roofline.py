"""Roofline of a train step: FLOPs and bytes by formula, and the least time that they take; nothing is measured.

The compiler's own `cost_analysis()` counts the body of a scan once, and for a kernel what the kernel claims; these
formulas count layers and micro-batches as often as they run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from mlra_jax.config import ModelConfig, TrainConfig
from mlra_jax.execution.accelerators import Accelerator
from mlra_jax.execution.flops import train_flops_per_token


@dataclasses.dataclass(frozen=True)
class Costs:
    """The work of one device in one step."""

    model_flops: float
    """FLOPs of the forward and backward pass, as `train_flops_per_token` counts them."""
    recomputed_flops: float
    """FLOPs that the backward pass recomputes."""
    memory_bytes: float
    """Traffic to high-bandwidth memory, if only operands of matmuls, attention and the optimizer leave the chip."""
    link_bytes: dict[str, float]
    """Bytes sent to other devices, by mesh axis."""

    def parts(self, chip: Accelerator) -> dict[str, float]:
        """Seconds for computation, memory and links, each at its peak rate."""
        return {
            "compute": (self.model_flops + self.recomputed_flops) / chip.flops,
            "memory": self.memory_bytes / chip.bandwidth,
            "links": sum(self.link_bytes.values()) / chip.links,
        }

    def at_best(self, chip: Accelerator) -> float:
        """Seconds if everything overlaps: a lower bound."""
        return max(self.parts(chip).values())

    def in_sequence(self, chip: Accelerator) -> float:
        """Seconds if nothing overlaps, at peak rates, for comparing plans."""
        return sum(self.parts(chip).values())


def recomputed_flops(config: ModelConfig, layer_params: int, seq_len: int, remat: str) -> float:
    """Matmul FLOPs per token and layer that the backward pass recomputes under the policy `remat`.

    The product with W_down never is: only the next layer's input, which is kept, depends on it.
    """
    product = 2 * config.d_model * config.d_ff  # one of the MLP's three matmuls
    attention = train_flops_per_token(config, 0, seq_len) / 3 / config.n_layers
    all_but_attention = 2 * layer_params - product
    return {
        "full": all_but_attention + attention,
        "attention": all_but_attention,
        "mlp": all_but_attention - 2 * product,
    }.get(remat, 0.0)


def step_costs(
    config: TrainConfig,
    mesh: Mapping[str, int],
    *,
    micro_batch: int,
    remat: str,
    n_params: int,
    layer_params: int,
    operands: int,
    kept: int,
    gather: str = "layer",
) -> Costs:
    """The costs of a step on each device of a mesh.

    Args:
      config: the run.
      mesh: sizes of `data`, `fsdp`, `tensor`, `context`.
      micro_batch: sequences per data-parallel device and micro-batch.
      remat: rematerialisation policy.
      n_params: parameters of the model, the tied embedding once.
      layer_params: parameters of one layer.
      operands: bytes per device that pass through memory in one layer's forward pass of one sequence.
      kept: bytes per device that this pass saves for the backward pass.
      gather: when weights that fsdp splits are gathered, and their gradients summed; see `ExecutionConfig.gather`.
    """
    m = config.model
    data, fsdp, tensor, context = (mesh[axis] for axis in ("data", "fsdp", "tensor", "context"))
    width = 2 if m.compute_dtype == "bfloat16" else 4
    n_micro = config.data.global_batch // (micro_batch * data * fsdp)
    length = config.data.seq_len
    tokens = micro_batch * length / context  # of a micro-batch, on a device
    sequences = n_micro * micro_batch  # of a step, on a device
    again = recomputed_flops(m, layer_params, length, remat)
    own, used = n_params / (fsdp * tensor), n_params / tensor  # parameters stored, computed with

    # Weights are read in the forward and the backward pass, and again to recompute; their gradients are written and,
    # with more than one micro-batch, added up in float32.
    passes = 2 + (again > 0)
    added = used if gather == "step" else own
    per_micro = passes * width * used + 2 * width * added + (8 * added if n_micro > 1 else 0)
    # Operands are written and read in the forward pass and read in the backward pass; their gradients are written and
    # read. What is not kept is recomputed from about as much, written and read; what is kept beyond it goes out and in.
    per_sequence = m.n_layers * (5 * operands + 3 * max(operands - kept, 0) + 2 * max(kept - operands, 0))
    logits = 4 * length / context * m.vocab_size / tensor * 4
    update = (24 + (4 if n_micro > 1 else width) + 4 + width) * own

    def ring(devices: int, size: float) -> float:
        """Bytes that each of `devices` sends in a ring all-gather or reduce-scatter of `size` bytes."""
        return size * (devices - 1) / devices

    table = m.vocab_size * m.d_model / tensor
    gathers = 3 * width * (used - table) + (8 + 2 * width) * table
    exchanged = width * tokens * m.d_model
    latents = width * m.attention.gathered_values(m.n_heads, tensor) * micro_batch * length
    if gather == "step":
        fsdp_bytes = ring(fsdp, width * (used - table) + 4 * table + 4 * used)
    else:
        fsdp_bytes = n_micro * ring(fsdp, gathers)
    links = {
        "fsdp": fsdp_bytes,
        "data": 2 * ring(data, (4 if n_micro > 1 else width) * own),  # once a step
        "tensor": n_micro * m.n_layers * (4 + (again > 0)) * 2 * ring(tensor, exchanged),
        "context": n_micro * m.n_layers * (2 + (remat != "none")) * ring(context, latents),
    }
    all_tokens = config.data.global_batch * length
    devices = data * fsdp * tensor * context
    return Costs(
        model_flops=train_flops_per_token(m, n_params, length) * all_tokens / devices,
        recomputed_flops=again * m.n_layers * all_tokens / devices,
        memory_bytes=n_micro * per_micro + sequences * (per_sequence + logits) + update,
        link_bytes={axis: size for axis, size in links.items() if size},
    )
