"""GLA-2: two latent heads, each read by half of the query heads (paper, 2.9 B).

    python train.py configs/gla_2.py

Parameters  2,872,630,272 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.249 on FineWeb-Edu, 13.779 mean of seven corpora; 58.30 % zero-shot mean (from the paper)
"""

from ._paper import latent, paper_config

get_config = paper_config("gla_2", attention=latent(2, n_branches=1, q_lora_rank=1024), d_ff=10048)
