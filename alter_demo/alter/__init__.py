"""ALTER itself: entropy, gate, experts, losses and trainer. Read `alter_demo/unlearn.py` first."""

PUBLISHED_THRESHOLD = 1.2  # of S_q (ALTER, section 3)
DEFAULT_Q = 1.5  # order of the entropy; the paper does not give it
MAX_EXPERTS = 8  # forgetting experts, B_r not counted
