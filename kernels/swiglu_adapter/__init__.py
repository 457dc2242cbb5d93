"""SwiGLU adapter with routed experts: ``base + scale * up(silu(gate n) * (down n))``."""
