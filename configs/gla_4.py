"""GLA-4: four latent heads, each read by a quarter of the query heads (paper, 2.9 B).

    python train.py configs/gla_4.py

Parameters  2,873,220,096 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.307 on FineWeb-Edu, 13.815 mean of seven corpora; 58.19 % zero-shot mean (from the paper)
"""

from ._paper import latent, paper_config

get_config = paper_config("gla_4", attention=latent(4, n_branches=1, q_lora_rank=1024), d_ff=10136)
