"""MQA: one key-value head, which every query head reads (paper, 2.9 B).

    python train.py configs/mqa.py

Parameters  2,872,003,584 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.533 on FineWeb-Edu, 14.306 mean of seven corpora; 57.55 % zero-shot mean (from the paper)
"""

from ._paper import grouped, paper_config

get_config = paper_config("mqa", attention=grouped(n_kv_heads=1), d_ff=10152)
