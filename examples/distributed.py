"""MAML on the curves of ``sinusoid.py``, tasks split over processes.

    torchrun --nproc-per-node=2 examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py --shard

Every rank draws its own curves. The first line wraps the learner in ``DistributedDataParallel``: the whole model is on every
rank, and the meta-gradient is the mean over all tasks. With ``--shard``, ``fully_shard`` splits the model over the ranks as
well: parameters, gradients and the state of Adam; the learner itself takes the mean then. Both train the same, and both
write a checkpoint that any number of processes goes on from: ``--checkpoint FOLDER`` resumes where there is one.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sinusoid import episode, loss_fn, network
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import metafast


def main() -> None:
    """Trains; rank 0 prints the mean error on test curves of all ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--tasks", type=int, default=16, help="of an iteration, on each rank")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("--checkpoint", type=Path)
    options = parser.parse_args()

    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_node_local_rank(0))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    error = train(options)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes, mean squared error after one step: {error:.3f}")
    # What train() has made holds the process group, sharded modules in cycles of references: it has to be gone before.
    gc.collect()
    dist.destroy_process_group()


def train(options: argparse.Namespace) -> float:
    """Trains on the tasks of this rank. Returns the mean error of all ranks after one step."""
    rank = dist.get_rank()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def draw(tasks: int, shots: int, generator: torch.Generator) -> list[tuple[Tensor, ...]]:
        return [tuple(points.to(device) for points in part) for part in episode(tasks, shots, generator)]

    torch.manual_seed(0)  # the same parameters on every rank
    model = network().to(device)
    if options.shard:
        for layer in model[::2]:  # those with parameters
            fully_shard(layer)
    meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.01), reduction="global_mean")
    learner = meta if options.shard else DistributedDataParallel(meta)
    optimizer = torch.optim.Adam(meta.parameters(), 1e-3)
    if options.checkpoint and options.checkpoint.exists():
        state = dict(zip(("meta", "optimizer"), get_state_dict(meta, optimizer), strict=True))
        dcp.load(state, checkpoint_id=options.checkpoint)
        set_state_dict(meta, optimizer, model_state_dict=state["meta"], optim_state_dict=state["optimizer"])

    generator = torch.Generator().manual_seed(rank)  # other tasks on every rank
    for _ in range(options.iterations):
        optimizer.zero_grad()
        learner(*draw(options.tasks, 5, generator)).backward()
        optimizer.step()
    if options.checkpoint:
        state = dict(zip(("meta", "optimizer"), get_state_dict(meta, optimizer), strict=True))
        dcp.save(state, storage_writer=dcp.FileSystemWriter(options.checkpoint, overwrite=True))

    support, (x, y) = draw(100, 10, torch.Generator().manual_seed(1000 + rank))
    error = (meta.adapt(support)(x) - y).square().mean()
    dist.all_reduce(error)
    return error.item() / dist.get_world_size()


if __name__ == "__main__":
    main()
