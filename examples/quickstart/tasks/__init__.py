"""The quickstart's specialist tasks, by expert name."""

from __future__ import annotations

from .arithmetic import TASK as MATH
from .conversion import TASK as CONVERT
from .extraction import TASK as JSON
from .sql import TASK as SQL
from .task import Example, Split, Task

TASKS: dict[str, Task] = {task.name: task for task in (SQL, JSON, MATH, CONVERT)}

__all__ = ["TASKS", "Example", "Split", "Task"]
