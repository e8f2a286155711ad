"""What ends a run."""


class RunError(RuntimeError):
    """The run cannot go on. The message is one line: the step, what happened, what is kept, the fix."""


class NonFiniteLossError(RunError):
    """The loss became NaN or infinite; the message names the step and what was kept."""
