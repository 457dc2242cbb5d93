"""What the kernels of several contracts share."""
