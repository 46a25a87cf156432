"""One meta-step: the inner loop, tasks side by side, memory, capture. No module here imports an algorithm."""
