"""Attention cores for mcore's layers: native on torch kernels, and Transformer Engine's."""
