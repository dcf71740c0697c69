"""What differs between the versions of JAX that we run on (0.11.1 to 0.12)."""
