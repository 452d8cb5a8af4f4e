"""What is wrong with a checkpoint, wherever it is noticed."""

from sl_jax.imaging.words import printable


class CheckpointError(ValueError):
    """A checkpoint folder that cannot be used, with every reason in the message.

    Names from files, of tensors for instance, may stand in it: what no terminal should get is
    escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message, keep="\n"))
