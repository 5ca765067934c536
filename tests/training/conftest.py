"""What DeepSpeed needs in a test's own process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A group of one worker: DeepSpeed's arithmetic and state without the time that starting processes takes."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("LOCAL_RANK", "0")  # as Ray Train sets it; DeepSpeed asks for it
        # ZeRO-3 puts a function of its own here for the whole process: put back what other tests measure.
        environment.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        yield
    # By DeepSpeed, which keeps copies of the group: with torch alone the next group of this process meets the old ones.
    import deepspeed.comm  # only now: covray sets what the import reads

    deepspeed.comm.destroy_process_group()
