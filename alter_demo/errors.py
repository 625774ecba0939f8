"""One exception for everything a person can put right: its text is one sentence that says how."""

from __future__ import annotations


class UserError(Exception):
    """Shown as it stands, without a traceback; the command line then exits with code 2."""
