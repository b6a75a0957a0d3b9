# Hugging Face's Hub-kernels client has this package's name, and transformers probes for it by
# importing this file: so nothing is imported here, and the version of a source tree is one that
# transformers takes for too old to use (README.md, "Names").
__version__ = "0.0.0"
