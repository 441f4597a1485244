"""Healing: a pruned model in, the same layers with better weights out, as a checkpoint directory.

`heal` (heal.py) is the way through: a patch without training (patch.py), QLoRA on text (qlora.py),
distillation from the whole model (distil.py), each of them where `Settings` asks for it.
"""
