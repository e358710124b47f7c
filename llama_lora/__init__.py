"""What the stages of the toolkit are made of: corpus, model, train."""

import atexit
import gc
import logging
import os
import sys

# On CPUs with AVX512-BF16 bitsandbytes fetches compiled code from a model hub while it is imported,
# where the package `kernels` is installed, and warns where it is not; transformers fetches some for
# certain bases. No code but what was installed runs here, so to both the package is not there.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# In 16 bits on a CPU oneDNN compiles products for each number of tokens that it meets, and keeps
# 1,024 of them, torch as many again in each thread: more than a GB. A step of training needs fewer
# than a hundred, each of them in all layers. Read when torch is imported.
for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(name, "128")

# A process that ends gives everything back: there is no garbage to look for among the million
# objects of the libraries, which takes a second.
atexit.register(gc.freeze)
