"""The exceptions that the package raises on purpose."""


class UserError(Exception):
    """An error that the user can fix. The message says how, so it is shown without a traceback."""


class Interrupted(Exception):
    """The client has gone, so the model stops computing at once."""


class Diverged(UserError):
    """Training made the loss NaN or infinite. An experiment records it and runs the next cell."""

    def __init__(self):
        super().__init__(
            "Training diverged: the loss is NaN or infinite. Use a lower learning rate."
        )
