"""Kernels that copy paged KV blocks, and the same in plain torch. Imports torch and triton only."""
