"""MLRA-4 trained on from 2K to 32K and then 128K tokens, with YaRN, as DeepSeek-V3 was (paper's model, 2.9 B).

    python train.py configs/long.py --init_from runs/mlra_4
    python train.py configs/long.py --name long_128k --init_from runs/long --data.seq_len 131072 --data.global_batch 8

1000 updates of 2^20 tokens each time, at the last learning rate of the run at 2K. Both have the rotary frequencies for
128K. Devices that are left after fsdp split the tokens of a sequence (`context`), which every device has as much work
with; a single GPU needs --mesh.fsdp 1.

Hardware    v5e:16x16, v6e:16x16 or v5p:4x4x4 (docs/scaling.md)
Wall time   not run
Result      not run
"""

import dataclasses

import mlra_jax as mlra

from .mlra_4 import get_config as trained_at_2k


def get_config() -> mlra.TrainConfig:
    before, steps = trained_at_2k(), 1000
    lr = before.optim.min_lr
    scaling = mlra.RotaryScalingConfig("yarn", factor=64.0, original_max_position=before.data.seq_len)
    return dataclasses.replace(
        before,
        name="long",
        init_from=before.run_dir,
        model=dataclasses.replace(before.model, rotary_scaling=scaling),
        data=dataclasses.replace(before.data, seq_len=32_768, global_batch=32, order="shuffled"),
        optim=dataclasses.replace(before.optim, lr=lr, min_lr=lr, warmup_steps=20, decay_steps=steps),
        mesh=mlra.MeshConfig(data=1, fsdp=8, context=-1),
        checkpoint=mlra.CheckpointConfig(every=100),
        log=mlra.LogConfig(every=1, eval_every=100, eval_sequences=64),
        steps=steps,
    )
