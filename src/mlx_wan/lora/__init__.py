"""Adapters (LoRA and its kin) beside the weights of a transformer: the layers, the files, and merging.

`layers` computes them and trains them, `dialects` knows what others call them, `load` reads a file into them,
`fuse` adds them to the weights for good.
"""
