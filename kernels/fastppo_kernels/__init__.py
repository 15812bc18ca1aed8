"""The Triton kernels of fastppo: plain functions on tensors, with only torch and triton beneath them.

The package lies in `kernels/`, which itself is not importable: that name belongs to Hugging Face's `kernels`.
"""
