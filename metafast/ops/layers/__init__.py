"""The functions of torch that layers are made of, as ``accelerate`` swaps them in."""
