"""The seven tasks. Each module draws a label as a picture (``draw``) and reads it back (``read``).

``RESAMPLE`` of a module says how its label may be resized: ``nearest`` where in-between colours would mean
something else, ``bicubic`` where the picture is a field or a photograph.
"""

from types import ModuleType

from covray.tasks import colorization, depth, edges, low_light, normals, pose, segmentation

TASKS: dict[str, ModuleType] = {
    "segmentation": segmentation,
    "pose": pose,
    "colorization": colorization,
    "normals": normals,
    "edges": edges,
    "depth": depth,
    "low_light": low_light,
}
"""Task name -> module, in the order of the paper's table."""
