"""MFA: one key-value head, 256 wide, and queries of low rank (paper, 2.9 B).

    python train.py configs/mfa.py

Parameters  2,873,232,384 (measured: counted from the shapes)
Hardware    8 x H100 80 GB (from the paper's repository); Wall time: not run
Result      perplexity 9.506 on FineWeb-Edu, 14.315 mean of seven corpora; 58.53 % zero-shot mean (from the paper)
"""

from ._paper import grouped, paper_config

get_config = paper_config("mfa", attention=grouped(1, d_head=256, q_lora_rank=2048), d_ff=8024)
