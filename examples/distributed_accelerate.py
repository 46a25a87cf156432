"""``distributed.py`` through Hugging Face Accelerate.

Run ``torchrun --nproc-per-node=2 examples/distributed_accelerate.py``.
"""

import sys

import torch
from accelerate import Accelerator
from sinusoid import episode, loss_fn, network

import metafast

accelerator = Accelerator(cpu=not torch.cuda.is_available())
torch.manual_seed(0)  # the same parameters on every process
meta = metafast.MAML(network(), loss_fn, inner=metafast.inner.SGD(lr=0.01), reduction="global_mean")
learner, optimizer = accelerator.prepare(meta, torch.optim.Adam(meta.parameters(), 1e-3))
generator = torch.Generator().manual_seed(accelerator.process_index)  # other tasks on every process
for _ in range(int(sys.argv[1]) if sys.argv[1:] else 2000):
    support, query = ([x.to(accelerator.device) for x in part] for part in episode(16, 5, generator))
    optimizer.zero_grad()
    loss = learner(support, query)
    accelerator.backward(loss)
    optimizer.step()
accelerator.print(f"{accelerator.num_processes} processes, loss of the last iteration: {loss.item():.3f}")
accelerator.free_memory(learner, optimizer)
del learner, loss  # DistributedDataParallel has to be gone before its process group is
accelerator.end_training()
