"""The same bits on a GPU: theta in device memory and its Triton kernels."""
