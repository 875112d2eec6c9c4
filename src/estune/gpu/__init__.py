"""Theta and the noise on a GPU, by Triton kernels that compute the same bits as the CPU kernels."""
