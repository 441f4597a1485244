"""What a decoder is: its config, what a family names and does differently, its rotary tables.

In: config.json (or what a GGUF says). Out: a `ModelConfig` that holds only what a decoder takes.
"""
