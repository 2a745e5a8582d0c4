"""A 126-million-parameter MLRA-4 with the GPT-2 vocabulary, for one GPU.

    python train.py configs/small.py --data.path DIR

DIR holds shards of GPT-2 tokens, written by `mlra-prepare` or the official FineWeb-Edu ones. 20,000 steps of 491,520
tokens are 9.8 B, drawn from all of them.

Hardware    one GPU with 80 GB
Wall time   not trained to its end
Result      not trained to its end
"""

import mlra_jax as mlra


def get_config() -> mlra.TrainConfig:
    steps = 20_000
    # The proportions of the 2.9 B model: A = D/3, C = H, R = H/2.
    attention = mlra.LatentAttentionConfig(
        n_latent_heads=4, n_branches=4, q_lora_rank=256, kv_lora_rank=256, d_nope=64, d_rope=32
    )
    return mlra.TrainConfig(
        name="small",
        model=mlra.ModelConfig(
            vocab_size=50304, n_layers=12, d_model=768, n_heads=12, d_ff=2432, attention=attention
        ),
        data=mlra.DataConfig(
            path="data/fineweb_edu", tokenizer="gpt2", seq_len=1024, global_batch=480, micro_batch=16
        ),
        optim=mlra.OptimConfig(lr=6e-4, min_lr=6e-5, warmup_steps=700, decay_steps=steps - 1),
        checkpoint=mlra.CheckpointConfig(every=1000, keep=2),
        log=mlra.LogConfig(every=10, eval_every=500, eval_sequences=400),
        steps=steps,
    )
