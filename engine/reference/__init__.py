"""The oracle in plain torch: a decoder over its kept layers, its cache, one layer at a time.

In: token ids and the weights of layers. Out: logits, and every boundary on the way.
"""
