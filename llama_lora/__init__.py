"""The library behind the scripts: corpus, model, training, answers, evaluation."""

import atexit
import gc
import logging
import os
import sys

# If the package `kernels` is installed, bitsandbytes fetches compiled code from a model hub when it
# is imported on a CPU with AVX512-BF16, and warns if it is not; transformers fetches some for
# certain bases. Only installed code runs here, so the package is hidden from both.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# In 16 bits on a CPU, oneDNN compiles products for each number of tokens it meets and keeps 1,024
# of them, and torch keeps as many again in each thread: more than a GB. A training step needs fewer
# than a hundred, each in all layers. These are read when torch is imported.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")

# On a card, let blocks of memory grow, instead of keeping one of each size: micro-batches hardly
# ever have the same number of tokens, nor have an answer's keys and values. CUDA reads this when it
# starts, for which importing bitsandbytes is enough.
if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# A process that ends gives everything back: there is no garbage to look for among the million
# objects of the libraries, which takes a second.
atexit.register(gc.freeze)
