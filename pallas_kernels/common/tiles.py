"""How channels fill the lanes of a TPU."""

LANES = 128


def tiles_per_block(num_channels: int, most: int) -> int:
    """Returns into blocks of how many times 128 channels to cut: of those that add the fewest channels, the largest."""
    tiles = -(-num_channels // LANES)
    return min(range(1, 1 + min(most, tiles)), key=lambda n: (-tiles % n, -n))
