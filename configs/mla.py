"""MLA: one latent head, which every device of a tensor-parallel group reads whole (paper, 2.9 B).

    python train.py configs/mla.py

Parameters  2,872,052,736 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.284 on FineWeb-Edu, 13.727 mean of seven corpora; 58.75 % zero-shot mean (from the paper)
"""

from ._paper import latent, paper_config

get_config = paper_config("mla", attention=latent(1, n_branches=1, q_lora_rank=1536), d_ff=9448)
