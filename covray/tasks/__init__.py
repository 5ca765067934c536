"""The tasks: what labels mean. Each module of this package is one task; ``base.Task`` says what it defines.

A module needs a line in ``_BUILT_IN``. A task of another package needs no change here: an installed package names it as
an entry point of the group ``covray.tasks``, and every process that imports covray finds it.
"""

from typing import Any

from covray.plugins import TASKS_GROUP, Plugin, Refused, load_plugins
from covray.tasks import colorization, depth, edges, low_light, normals, pose, segmentation
from covray.tasks.base import Task

_BUILT_IN: tuple[Task, ...] = (
    segmentation,
    pose,
    colorization,
    normals,
    edges,
    depth,
    low_light,
)
_ATTRIBUTES = ("name", "short", "resample", "metrics", "meta_keys", "render", "read", "score", "mean", "export")
"""What a task has (``base.Task``)."""

TASKS: dict[str, Task] = {task.name: task for task in _BUILT_IN}
"""The tasks by name, in the order of the paper's table; those of other packages follow."""


def _register(entry: str, task: Any) -> str:
    """Add the task of another package; return its name. Raises Refused."""
    missing = [attribute for attribute in _ATTRIBUTES if not hasattr(task, attribute)]
    if missing:
        raise Refused(f"is no task: it lacks {', '.join(missing)}")
    name = str(task.name)
    if name in TASKS:
        raise Refused(f"has the name of another task, {name}")
    TASKS[name] = task
    return name


def load_task_plugins() -> list[Plugin]:
    """Add the tasks of installed packages to ``TASKS``; return all that there are, also those that cannot be used."""
    return load_plugins(TASKS_GROUP, _register)


PLUGINS = load_task_plugins()
"""The tasks of other packages, as they were found when covray was imported."""
