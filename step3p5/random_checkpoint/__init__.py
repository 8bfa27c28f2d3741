"""Random checkpoints in the public checkpoint's form, for tests and benchmarks without the 392 GB download.

`python -m step3p5.random_checkpoint OUT --preset tiny` writes one; `write_random_checkpoint` does it from Python.
"""

from step3p5.random_checkpoint.writer import CheckpointSummary, RandomCheckpointError, write_random_checkpoint

__all__ = ["CheckpointSummary", "RandomCheckpointError", "write_random_checkpoint"]
