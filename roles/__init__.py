"""What each role of the loop must do, and the roles as shipped."""

import logging

# bitsandbytes takes our `kernels` for Hugging Face's (README.md, "Names"), and complains on some
# CPUs that it lacks a pass which is not taken here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
