"""What the terminal shows: progress, tables, and the first Ctrl-C."""

import signal
import sys

from ..callbacks import Callback


class TerminalCallback(Callback):
    """Progress bars with the time left on stderr. The first Ctrl-C stops after this step.

    Use it as a context manager. A second Ctrl-C leaves at once.
    """

    def __init__(self, kept: str = "what was learned is kept"):
        self.stop, self.kept, self.bars = False, kept, {}

    def __enter__(self):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.progress import TimeRemainingColumn as Remaining

        columns = TextColumn("{task.description:<34}"), BarColumn(24), TimeElapsedColumn()
        self.progress = Progress(*columns, Remaining(), console=Console(stderr=True)).__enter__()
        self.handler = signal.signal(signal.SIGINT, self.request_stop)
        return self

    def __exit__(self, *error):
        self.progress.__exit__(*error)
        signal.signal(signal.SIGINT, self.handler)

    def request_stop(self, *_):
        if self.stop:
            raise KeyboardInterrupt
        self.stop = True
        text = f"\nStopping after this step; {self.kept}. Press Ctrl-C again to leave at once."
        print(text, file=sys.stderr)

    def should_stop(self):
        return self.stop

    def on_stage(self, stage, share):
        if stage not in self.bars:
            for bar in self.bars.values():
                self.progress.update(bar, completed=1.0)
            self.bars[stage] = self.progress.add_task(stage, total=1.0)
        self.progress.update(self.bars[stage], completed=share)

    def on_step(self, entry, max_steps):
        stage = "phase two: unlearning" if "forget" in entry else "teaching"
        self.on_stage(stage, entry["step"] / max_steps)


def print_table(columns, rows) -> None:
    """A table of text cells on stdout."""
    from rich.table import Table

    table = Table(show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console().print(table)


def print_text(text: str) -> None:
    console().print(text)


def console():
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def escape(text: str) -> str:
    """Model and user text without control codes and without rich's markup."""
    from rich.markup import escape

    shown = {"\n": "⏎", "\t": "⇥"}
    return escape("".join(c if c.isprintable() else shown.get(c, "�") for c in text))
