"""MLRA-4: each query head sums four latent heads; the cache splits over four devices (paper, 2.9 B).

    python train.py configs/mlra_4.py

Parameters  2,873,220,096 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.193 on FineWeb-Edu, 13.672 mean of seven corpora; 58.84 % zero-shot mean (from the paper)
"""

from ._paper import latent, paper_config

get_config = paper_config("mlra_4", attention=latent(4, n_branches=4, q_lora_rank=1024), d_ff=9880)
