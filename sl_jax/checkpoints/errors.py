"""What is wrong with a checkpoint, wherever it is noticed."""


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, with every reason in the message."""
