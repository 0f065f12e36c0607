"""What is learned now: a task, and what its batches count; a program may give another task between two calls or two steps."""

from __future__ import annotations

from hvdtrain.training.counting import Counting
from hvdtrain.training.epoch_metrics import described
from hvdtrain.training.task import Learning


class Lesson:
    """Holds the task; whoever needs it asks here each time.

    Args:
        task: The first one.

    Attributes:
        task: What is learned.
        counting: What its batches count.
    """

    def __init__(self, task: Learning) -> None:
        self.give(task)

    def give(self, task: Learning) -> None:
        """From now on this task is learned.

        Raises:
            ConfigError: It has what cannot be computed over ranks; nothing has changed then.
        """
        described(task)
        self.task, self.counting = task, Counting(task)
