"""What a captured learner records anew for, what it says of it, and the memory that recording takes."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import metafast
from metafast.inner import SGD

TASKS, STEPS, RATE = 3, 2, 0.1


class Scaled(nn.Module):
    """Reads a number, a tensor that is no buffer, and a mask of its own that fits the batch."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale, self.shift, self.mask = 1.0, torch.zeros(4).double(), None

    def forward(self, x):
        n = x.shape[0]
        if self.mask is None or self.mask.shape[-1] != n:
            self.mask = x.new_ones(n, n).tril()
        return self.linear(self.mask @ x) * self.scale + self.shift


class Loss:
    """A loss with a number of its own."""

    power = 2

    def __call__(self, model, batch):
        return model(batch).abs().pow(self.power).mean()


def learner(loss_fn=None, **options):
    return metafast.MAML(Scaled().double(), loss_fn or Loss(), inner=SGD(lr=RATE), steps=STEPS, capture=True, **options)


@pytest.fixture
def draw(generator):
    return lambda n=5: torch.randn(TASKS, n, 4, generator=generator, dtype=torch.float64)


def other_batches(meta, number):
    return 3 + number


def other_number(meta, number):
    meta.model.scale = 1.0 + number


def other_tensor(meta, number):
    meta.model.shift = torch.full((4,), float(number)).double()


def new_hook(meta, number):
    meta.model.linear.register_forward_hook(lambda module, args, output: output * 2)


def new_buffer(meta, number):
    meta.model.register_buffer(f"buffer_{number}", torch.zeros(2).double())


def other_layer(meta, number):
    meta.model.linear = type(f"Linear{number}", (nn.Linear,), {})(4, 4).double()


def other_option(meta, number):
    meta.inner = SGD(lr=RATE + 0.01 * number)


CAUSES = {
    "shapes": (other_batches, ["shapes, dtypes or devices", "model.mask"]),
    "a number": (other_number, ["model.scale"]),
    "a tensor": (other_tensor, ["model.shift"]),
    "a hook": (new_hook, ["model.linear._forward_hooks"]),
    "a buffer": (
        new_buffer,
        ["shapes, dtypes or devices", "what requires a gradient", "names of parameters and buffers"],
    ),
    "a class": (other_layer, ["class of model.linear"]),
    "an option": (other_option, ["inner"]),
}


@pytest.mark.parametrize(("change", "named"), CAUSES.values(), ids=CAUSES)
def test_repeated_recordings_are_told_once(draw, caplog, change, named):
    meta = learner()
    with caplog.at_level(logging.INFO, "metafast"):
        for number in range(6):
            n = change(meta, number) or 5
            meta(draw(n), draw(n))
    assert caplog.text.count("capture: recorded") == 6
    (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.endswith("since each time something was new: " + ", ".join(named))


def test_two_kinds_of_calls_in_turn_are_not_told(draw, caplog):
    meta = learner()
    with caplog.at_level(logging.INFO, "metafast"):
        for number in range(8):
            meta.train(number % 2 == 0)
            meta(draw(), draw())
    assert caplog.text.count("capture: recorded") == 2
    assert "were all recorded" not in caplog.text


def test_acceleration_around_a_captured_call(draw, caplog):
    meta = learner()
    with caplog.at_level(logging.INFO, "metafast"):
        for _ in range(3):
            with metafast.accelerate(meta.model):
                meta(draw(), draw())
        meta(draw(), draw())
        handle = metafast.accelerate(meta.model)
        meta(draw(), draw())
        handle.remove()
    assert caplog.text.count("capture: recorded") == 1


MEMORY = """
import ctypes, gc, threading, time
import torch
from torch import nn
import metafast
from metafast.inner import SGD

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

class Watch(threading.Thread):
    peak, over = 0, False
    def run(self):
        while not self.over:
            self.peak = max(self.peak, resident())
            time.sleep(0.001)

torch.set_num_threads(1)
layers = [layer for _ in range(12) for layer in (nn.Linear(256, 256), nn.Tanh())]
def learner(model):
    return metafast.MAML(model, lambda model, x: model(x).square().mean(), inner=SGD(lr=0.1), steps=3, capture=True)

meta = learner(nn.Sequential(*layers))
draw = lambda: torch.randn(4, 64, 256)
# What torch loads at its first recording is no memory of a program.
learner(nn.Linear(2, 2))(torch.randn(1, 2, 2), torch.randn(1, 2, 2)).backward()
program = metafast.program.Program
made = []
original = program.__init__
def init(self, *args):
    watch, before = Watch(), resident()
    watch.start()
    original(self, *args)
    watch.over = True
    watch.join()
    made.append((watch.peak - before, self.bytes))
program.__init__ = init
for _ in range(4):
    meta(draw(), draw()).backward()
gc.collect()
rest = resident()
ctypes.CDLL(None).malloc_trim(0)
print(*made[0], rest, resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory as Linux tells it")
def test_recording_takes_less_memory_than_running_and_leaves_none():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    recording, program, rest, trimmed = map(int, done.stdout.split())
    assert recording < program
    assert rest - trimmed < program / 2
