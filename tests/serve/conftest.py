"""The run, backbone and pictures of the tests of ``covray generate``."""

from tests.generation.test_generator import llama_folder, pictures, prior_folder, write_run

__all__ = ["llama_folder", "pictures", "prior_folder", "write_run"]
