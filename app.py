"""Starts the app: `python app.py`, then open http://127.0.0.1:7860."""

from alter_demo.app.main import build, launch

demo = build()

if __name__ == "__main__":
    launch(demo)
