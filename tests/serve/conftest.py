"""The run, backbone and pictures of the tests of ``covray generate``."""

from tests.generation.conftest import llama_folder, pictures, prior_folder, write_run

__all__ = ["llama_folder", "pictures", "prior_folder", "write_run"]
