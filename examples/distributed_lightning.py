"""``distributed.py`` through Lightning 2, which starts both processes itself.

Run ``python examples/distributed_lightning.py``.
"""

import sys

import lightning
import torch
from sinusoid import episode, loss_fn, network

import metafast


class MetaTraining(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.meta = metafast.MAML(network(), loss_fn, inner=metafast.inner.SGD(lr=0.01), reduction="global_mean")

    def training_step(self, tasks):
        return self.meta(*tasks)

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(self.global_rank)  # other tasks on every process
        return (episode(16, 5, generator) for _ in range(self.trainer.max_steps))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


steps = int(sys.argv[1]) if sys.argv[1:] else 2000
trainer = lightning.Trainer(devices=2, strategy="ddp", max_steps=steps, logger=False, enable_checkpointing=False)
trainer.fit(MetaTraining())
trainer.print(f"{trainer.world_size} processes, {trainer.global_step} iterations")
