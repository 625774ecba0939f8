"""The app: `main.build` makes the page, `main.launch` serves it.

The page is up before torch: only jobs import torch and transformers.
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported
