"""What the stages of the toolkit are made of: corpus, model, train."""

import logging
import sys

# On CPUs with AVX512-BF16 bitsandbytes fetches compiled code from a model hub while it is imported,
# where the package `kernels` is installed, and warns where it is not; transformers fetches some for
# certain bases. No code but what was installed runs here, so to both the package is not there.
sys.modules.setdefault("kernels", None)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
