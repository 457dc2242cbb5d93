"""Aurora: mode approximation, all adapted weights share the factors of their low-rank updates."""
