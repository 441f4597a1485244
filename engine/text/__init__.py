"""Text to token ids and back: tokenizers, chat templates, streaming, calibration text.

Built on `tokenizers` alone, which imports in milliseconds; transformers is loaded only by
`Text.to_transformers`.
"""

from engine.text.corpus import default_text, heldout_text, mixed_text, read_text_file
from engine.text.gguf import text_from_gguf
from engine.text.load import load_text
from engine.text.text import Text

__all__ = [
    "Text",
    "default_text",
    "heldout_text",
    "load_text",
    "mixed_text",
    "read_text_file",
    "text_from_gguf",
]
