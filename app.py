"""Starts the demo: python app.py, then http://127.0.0.1:7860."""

from alter_demo.pages import build, launch

demo = build()

if __name__ == "__main__":
    launch(demo)
