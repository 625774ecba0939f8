"""One exception for everything a person can put right: its text is one sentence that says how."""

from __future__ import annotations


class UserError(Exception):
    """Shown as it stands, without a traceback; the command line then exits with code 2."""


class Interrupted(Exception):
    """Whoever asked has left: what is being computed is given up at once."""


class Diverged(UserError):
    """Training left the model without numbers. A grid records that and goes on with the next method."""

    def __init__(self):
        super().__init__("The model's losses are no numbers any more: it diverged. Try a lower learning rate.")
