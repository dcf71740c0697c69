"""What a TPU can do per cycle: the constants that turn a schedule into time."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of JAX. A vector matmul is the instruction that feeds rows to a matrix unit (MXU)."""

    topology: str
    """The smallest slice that libtpu compiles for."""
    ghz: float
    hbm_gb_per_second: float
    num_mxus: int
    vmatmul_cycles: int
    """That one bf16 vector matmul of 16 rows keeps its MXU busy; half of it for the 8 rows of a float32 one."""
    results_per_vmatmul: int
    num_cores: int = 1
    """That share a device, and halve a parallel axis of the grid among them."""

    @property
    def hbm_bytes_per_cycle(self) -> float:
        return self.hbm_gb_per_second / self.ghz


# Clock x MXUs x products per cycle is the published peak: 197 TFLOP/s (v5e), 459 (v5p), 918 (v6e). Bandwidths are the
# published ones. TPU7x is left out: how long its vector matmul takes is not established.
CHIPS = {
    "v5e": Chip(
        topology="v5e:2x2", ghz=1.5, hbm_gb_per_second=819, num_mxus=4, vmatmul_cycles=16, results_per_vmatmul=2
    ),
    "v5p": Chip(
        topology="v5p:2x2x1",
        ghz=1.75,
        hbm_gb_per_second=2765,
        num_mxus=4,
        vmatmul_cycles=16,
        results_per_vmatmul=2,
        num_cores=2,
    ),
    "v6e": Chip(
        topology="v6e:2x2", ghz=1.75, hbm_gb_per_second=1640, num_mxus=2, vmatmul_cycles=8, results_per_vmatmul=4
    ),
}
