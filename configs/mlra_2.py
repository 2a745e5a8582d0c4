"""MLRA-2: each query head sums two of four latent heads; the cache splits over four devices (paper, 2.9 B).

    python train.py configs/mlra_2.py

Parameters  2,872,630,272 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.242 on FineWeb-Edu, 13.804 mean of seven corpora; 58.68 % zero-shot mean (from the paper)
"""

from ._paper import latent, paper_config

get_config = paper_config("mlra_2", attention=latent(4, n_branches=2, q_lora_rank=1024), d_ff=10048)
