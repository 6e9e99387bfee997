"""Two processes of a gloo group on one machine.

They are forked from a server that has imported what they need: a process that starts anew spends
most of its time on that.
"""

import multiprocessing
import os
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2

multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "wn_kernels.parallel"]
)


def _process(rank, file, job, arguments):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=WORLD)
    job(rank, *arguments)
    # gloo's threads may outlive their group, and then abort an orderly end.
    dist.barrier()
    os._exit(0)


def run(folder, job, *arguments):
    """`job(rank, *arguments)` in each process; raises what one of them raised.

    They meet at a file of their own in `folder`.
    """
    file = os.path.join(folder, f"rendezvous-{job.__name__}")
    mp.start_processes(_process, (file, job, arguments), nprocs=WORLD, start_method="forkserver")
