"""The names of the tasks' metrics, as tests of pages and tables need them."""

from covray.tasks import TASKS

METRICS = {task.name: tuple(metric.name for metric in task.metrics if metric.of_set is None) for task in TASKS.values()}
"""The metrics of an episode by task, the primary one first."""
SET_METRICS = {
    task.name: tuple(metric.name for metric in task.metrics if metric.of_set is not None) for task in TASKS.values()
}
"""The metrics of a set of episodes by task."""
LOWER_IS_BETTER = frozenset(
    metric.name for task in TASKS.values() for metric in task.metrics if metric.better == "lower"
)
