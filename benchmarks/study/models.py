"""The six models that are compared: one shape and one recipe, and MLP widths that bring them to one parameter count."""

from __future__ import annotations

from typing import NamedTuple

import mlra_jax as mlra

VOCAB = 8192
"""Ids of the tokenizer that is trained on the corpora."""
LAYERS = 8
N_HEADS = 8
HEAD = 64
"""H: width of a head without its rotary part; the GPU kernels take no narrower ones."""
SEQ_LEN = 1024
GLOBAL_BATCH = 32
EVALUATIONS = 6
"""Times that the held-out loss is measured in a run, evenly spread; the last one is what is reported."""


class Variant(NamedTuple):
    """What a model does not share with the others: `d_ff` makes its parameters as many as theirs."""

    label: str
    attention: mlra.AttentionConfig
    d_ff: int


def _latent(n_latent_heads: int, n_branches: int, q_lora_rank: int = 192) -> mlra.LatentAttentionConfig:
    # The 2.9 B models' proportions: latents of 4 H in all, R = H / 2; A = D / 3 (to a multiple of 64), MLA's D / 2.
    return mlra.LatentAttentionConfig(
        n_latent_heads=n_latent_heads,
        n_branches=n_branches,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=4 * HEAD,
        d_nope=HEAD,
        d_rope=HEAD // 2,
    )


VARIANTS = {
    "mlra_4": Variant("MLRA-4", _latent(4, 4), 1504),
    "mlra_2": Variant("MLRA-2", _latent(4, 2), 1584),
    "mla": Variant("MLA", _latent(1, 1, q_lora_rank=256), 1448),
    "gla_2": Variant("GLA-2", _latent(2, 1), 1584),
    "gqa": Variant("GQA", mlra.GroupedAttentionConfig(n_kv_heads=N_HEADS // 4, d_head=HEAD), 1672),
    "mha": Variant("MHA", mlra.GroupedAttentionConfig(n_kv_heads=N_HEADS, d_head=HEAD), 1416),
}
"""Variants by name. The key-value heads of GQA are a quarter of the query heads, as in the paper."""


def study_config(
    variant: str,
    seed: int,
    *,
    data: str,
    tokenizer: str,
    steps: int,
    lr: float,
    out: str,
    eval_sequences: int,
    layers: int = LAYERS,
) -> mlra.TrainConfig:
    """The run of one variant and seed.

    Args:
      variant: of `VARIANTS`.
      seed: of the initial parameters and of the order of the data.
      data: folder of the shards.
      tokenizer: its JSON file.
      steps: updates of `GLOBAL_BATCH` sequences; warm-up is a tenth of them, and the cosine ends with them.
      lr: peak learning rate; it falls to a tenth of it.
      out: folder of the run.
      eval_sequences: held-out sequences in an evaluation.
      layers: of the model; fewer only to try the commands out.
    """
    v = VARIANTS[variant]
    return mlra.TrainConfig(
        name=f"{variant}_seed_{seed}",
        out=out,
        model=mlra.ModelConfig(
            vocab_size=VOCAB,
            n_layers=layers,
            d_model=N_HEADS * HEAD,
            n_heads=N_HEADS,
            d_ff=v.d_ff,
            attention=v.attention,
        ),
        data=mlra.DataConfig(path=data, tokenizer=tokenizer, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH),
        optim=mlra.OptimConfig(
            lr=lr, min_lr=lr / 10, warmup_steps=steps // 10, decay_steps=max(steps - 1, steps // 10 + 1)
        ),
        mesh=mlra.MeshConfig(),
        # A run is short: it is saved at its end, and when SIGTERM stops it.
        checkpoint=mlra.CheckpointConfig(every=steps, keep=1),
        log=mlra.LogConfig(
            every=10,
            eval_every=-(-steps // EVALUATIONS),
            eval_sequences=eval_sequences,
            tensorboard=False,
        ),
        steps=steps,
        seed=seed,
    )
