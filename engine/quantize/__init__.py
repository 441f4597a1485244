"""From weights to 4 bits: grids, methods, what becomes of which tensor, a packed directory.

In: a checkpoint and the layers kept. Out: `Packed` matrices, a file for every layer.
"""
