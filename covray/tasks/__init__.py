"""The tasks: what labels mean. Each module of this package is one task; ``base.Task`` says what it defines.

A module needs a line in ``_OWN``. A task of another package needs no change here: an installed package names it as an
entry point of the group ``covray.tasks``, and every process that imports covray finds it.
"""

from covray.plugins import TASKS_GROUP, Registry, own_entry, require_attributes
from covray.tasks import colorization, depth, edges, low_light, normals, pose, segmentation
from covray.tasks.base import Task

_OWN = (
    segmentation.name,
    pose.name,
    colorization.name,
    normals.name,
    edges.name,
    depth.name,
    low_light.name,
)
_ATTRIBUTES = (
    "name", "short", "resample", "continuous", "metrics", "meta_keys", "render", "read", "score", "mean", "export",
)  # fmt: skip
"""What a task has (``base.Task``)."""


def load_tasks() -> Registry[Task]:
    """Return covray's tasks and those of installed packages, also those that cannot be used."""
    registry = Registry[Task](
        TASKS_GROUP,
        "task",
        [own_entry(name, f"covray.tasks.{name}") for name in _OWN],
        require_attributes("task", _ATTRIBUTES),
        lambda _, task: str(task.name),
    )
    # Now, and not when one is asked for: configurations check names of tasks as they are read.
    registry.load_all()
    return registry


REGISTRY = load_tasks()
"""The tasks, as they were found when covray was imported."""
TASKS: dict[str, Task] = REGISTRY.objects
"""The tasks by name, in the order of the paper's table; those of other packages follow."""


def table_order(name: str) -> tuple[int, str]:
    """Return a key that sorts names of tasks as ``TASKS`` has them; those that are not installed come last."""
    names = list(TASKS)
    return (names.index(name) if name in TASKS else len(names), name)
