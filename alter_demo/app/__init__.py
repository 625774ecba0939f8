"""The app. Only its jobs import torch and transformers, so the page is up before them."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio reads it when it is imported
