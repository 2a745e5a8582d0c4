"""MHA: every query head has its own key-value head (paper, 2.9 B).

    python train.py configs/mha.py

Parameters  2,872,593,408 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.434 on FineWeb-Edu, 13.860 mean of seven corpora; 57.81 % zero-shot mean (from the paper)
"""

from ._paper import grouped, paper_config

get_config = paper_config("mha", attention=grouped(n_kv_heads=24), d_ff=8192)
