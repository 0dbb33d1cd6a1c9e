"""Turn off the bars and the repeated advice of the libraries underneath, where merit shows its own progress."""

from __future__ import annotations

import os
import warnings


def quiet_libraries() -> None:
    """Call before they are imported; errors still come through."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers(\..*)?")
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
