"""One example, apart from all that needs torch: a report looks at some without it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Example:
    """One conversation as the model reads it: int32 ids and labels of the same length.

    `source` is the conversation that it is a piece of, or its own id.
    """

    id: str
    source: str
    ids: np.ndarray
    labels: np.ndarray
