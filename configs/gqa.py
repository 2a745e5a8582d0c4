"""GQA: six key-value heads, each serving four query heads (paper, 2.9 B).

    python train.py configs/gqa.py

Parameters  2,872,593,408 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.427 on FineWeb-Edu, 14.139 mean of seven corpora; 57.89 % zero-shot mean (from the paper)
"""

from ._paper import grouped, paper_config

get_config = paper_config("gqa", attention=grouped(n_kv_heads=6), d_ff=9728)
