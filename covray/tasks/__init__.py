"""The tasks: what labels mean. Each module of this package is one task; ``base.Task`` says what it defines.

A module needs a line in ``_BUILT_IN``. A task of another package needs no change here: an installed package names it as
an entry point of the group ``covray.tasks``, and every process that imports covray finds it.
"""

from importlib.metadata import entry_points

from covray.errors import ConfigError, one_line
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
_GROUP = "covray.tasks"

TASKS: dict[str, Task] = {task.name: task for task in _BUILT_IN}
"""The tasks by name, in the order of the paper's table; those of other packages follow."""


def _add_plugins() -> None:
    """Add the tasks of installed packages. Raises ConfigError for one that cannot be used."""
    for point in entry_points(group=_GROUP):
        try:
            task: Task = point.load()
            name = task.name
        except Exception as error:  # a plug-in may raise anything
            raise ConfigError(
                f"task {point.value}: cannot be loaded ({one_line(error)}); fix or uninstall its package"
            ) from error
        if name in TASKS:
            raise ConfigError(f"task {point.value}: its name {name} is taken; rename it or uninstall its package")
        TASKS[name] = task


_add_plugins()
