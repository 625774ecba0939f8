"""What a caller can hook into a run: progress, live answers, and stopping."""

from collections.abc import Iterable


class Callback:
    """Base class; every method does nothing. Pass instances to `unlearn` and `Run.evaluate`."""

    live_answers = False  # True: a few questions are answered each time the probe is measured

    def on_stage(self, stage: str, share: float) -> None:
        """What is running now, and the share of it that is done, from 0 to 1."""

    def on_step(self, entry: dict, max_steps: int) -> None:
        """After each training step: its entry of the history, and the maximum number of steps."""

    def on_answers(self, step: int, answers: list[tuple[str, str, str]]) -> None:
        """(group, question, greedy answer) of two forget and two retain questions."""

    def should_stop(self) -> bool:
        """Asked after each step and while measuring. True ends that phase.

        A stopped training keeps what it has learned, a stopped measurement no figures.
        """
        return False


class CallbackList(Callback):
    """Several callbacks as one."""

    def __init__(self, callbacks: Iterable[Callback] = ()):
        self.callbacks = tuple(callbacks)
        self.live_answers = any(c.live_answers for c in self.callbacks)

    def on_stage(self, stage, share):
        for callback in self.callbacks:
            callback.on_stage(stage, share)

    def on_step(self, entry, max_steps):
        for callback in self.callbacks:
            callback.on_step(entry, max_steps)

    def on_answers(self, step, answers):
        for callback in self.callbacks:
            callback.on_answers(step, answers)

    def should_stop(self):
        return any(callback.should_stop() for callback in self.callbacks)
