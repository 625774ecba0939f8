"""ALTER itself: entropy, gate, experts, losses and trainer. Read `alter_demo/unlearn.py` first."""

PUBLISHED_THRESHOLD = 1.2  # of S_q at q = 1.5 (ALTER, section 3)
MAX_EXPERTS = 8  # forgetting experts, B_r not counted
