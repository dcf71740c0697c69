"""Accelerators that are not here: what they can do, and meshes of them to compile for.

libtpu compiles for TPUs, a plugin of JAX and ptxas for H100; neither needs the device. They come with
`pip install 'efficient_lm[aot]'` and `'efficient_lm[aot-h100]'`.
"""

import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from efficient_lm.hlo import SLICES
from efficient_lm.sharding import slice_of

H100 = pathlib.Path(__file__).parent / "h100.txtpb"
GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device of JAX, by its maker's data sheet."""

    platform: str
    """That programs are lowered for."""
    memory_bytes: int
    flops: float
    """Per second, of dense products in bfloat16."""
    memory_bytes_per_second: float
    link_bytes_per_second: float
    """Of one link to a neighbour, one way."""
    dims: int
    """Of the torus that the chips make; 0: every device reaches the others of its host through one switch."""
    wraps_at: int = 0
    """A dimension of the torus closes to a ring if its size is a multiple of this."""
    devices_per_chip: int = 1
    host_bytes_per_second: float = 0.0
    """From host to host, per device, one way, where that is another network: between slices of TPUs, nodes of GPUs."""


# https://docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}: capacity, bandwidth, peak and the ICI bandwidth of a chip
# in both directions over its 4 or 6 ports; that of the data center's network (v5e: 6.4 Tb/s for 256 chips; v6e: 25.6);
# which slices close to a torus: https://jax-ml.github.io/scaling-book/tpus.
# JAX shows the two halves of a TPU7x as devices. https://www.nvidia.com/en-us/data-center/h100 (SXM): NVLink has
# 900 GB/s in both directions; the memory is what its driver reports; a network card of 400 Gb/s for each GPU.
CHIPS = {
    "v5e": Chip(
        platform="tpu",
        memory_bytes=16 * GIB,
        flops=197e12,
        memory_bytes_per_second=819e9,
        link_bytes_per_second=400e9 / 8,
        dims=2,
        wraps_at=16,
        host_bytes_per_second=6.4e12 / 256 / 8,
    ),
    "v5p": Chip(
        platform="tpu",
        memory_bytes=95 * GIB,
        flops=459e12,
        memory_bytes_per_second=2765e9,
        link_bytes_per_second=1200e9 / 12,
        dims=3,
        wraps_at=4,
        host_bytes_per_second=50e9 / 8,
    ),
    "v6e": Chip(
        platform="tpu",
        memory_bytes=32 * GIB,
        flops=918e12,
        memory_bytes_per_second=1640e9,
        link_bytes_per_second=800e9 / 8,
        dims=2,
        wraps_at=16,
        host_bytes_per_second=25.6e12 / 256 / 8,
    ),
    "tpu7x": Chip(
        platform="tpu",
        memory_bytes=96 * GIB,
        flops=2307e12 / 2,
        memory_bytes_per_second=7380e9 / 2,
        link_bytes_per_second=1200e9 / 12 / 2,
        dims=3,
        wraps_at=4,
        devices_per_chip=2,
        host_bytes_per_second=100e9 / 8 / 2,
    ),
    "h100": Chip(
        platform="cuda",
        memory_bytes=84942979072,
        flops=989e12,
        memory_bytes_per_second=3352e9,
        link_bytes_per_second=900e9 / 2,
        dims=0,
        host_bytes_per_second=400e9 / 8,
    ),
}
GPUS_PER_HOST = 8


def prepare_compilers() -> None:
    """Sets what libtpu and JAX read when they start, so that they look for no device; before JAX computes anything."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # For several of these at a time.
    # Else it asks the network which TPU this is, and complains for a page.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")


@dataclasses.dataclass(frozen=True)
class Target:
    """Chips that are wired together."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension of the torus; of GPUs, their number."""
    num_slices: int = 1
    """Tori of this shape, which the data center's network connects."""

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.chip.devices_per_chip * self.num_slices

    def devices(self) -> list[Any]:
        """Returns stand-ins for the devices, to compile for.

        Raises:
          ValueError: the compiler is not installed, or knows no such slice.
        """
        try:
            if self.chip.platform == "tpu":
                slices = {"num_slices": self.num_slices} if self.num_slices > 1 else {}
                name = self.name.removeprefix(f"{self.num_slices}x")
                return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
            hosts = max(self.num_devices // GPUS_PER_HOST, 1)
            config = {"target_config": H100.read_text(), "topology": f"1x{hosts}x{self.num_devices // hosts}"}
            return list(topologies.get_topology_desc(platform="cuda", topology_name="h100", **config).devices)
        except (jax.errors.JaxRuntimeError, RuntimeError, ImportError) as error:
            extra = "aot" if self.chip.platform == "tpu" else "aot-h100"
            raise ValueError(
                f"no compiler for {self.name}: {str(error).splitlines()[0]} (pip install 'efficient_lm[{extra}]', and "
                "a shape that is sold)"
            ) from error

    def bytes_per_second(self, mesh: Mesh, axes: tuple[str, ...]) -> float:
        """Returns at what rate a device can receive from the others along these axes of the mesh, at most.

        A ring, or all rings of a part of the torus, reach it. A line has one link at its ends. Other traffic is not
        there, distance costs nothing. Along SLICES it is the data center's network, along others a slice's own.
        """
        if axes == SLICES:
            return self.chip.host_bytes_per_second
        line = [slice(None) if axis in axes else 0 for axis in mesh.axis_names]
        devices = list(mesh.devices[tuple(line)].flat)
        devices = [device for device in devices if slice_of(device) == slice_of(devices[0])]
        if not self.chip.dims:
            hosts = {device.process_index for device in devices}
            return self.chip.link_bytes_per_second if len(hosts) == 1 else self.chip.host_bytes_per_second
        links = 0
        for dim, size in enumerate(self.shape):
            length = len({device.coords[dim] for device in devices})
            links += 2 if length == size and size % self.chip.wraps_at == 0 else length > 1
        # Both halves of a chip: their connection is as fast as six links.
        return self.chip.link_bytes_per_second * (links or 6)


def parse_target(text: str) -> Target:
    """Returns the chips that "v5e:16x16", "2xv5e:16x16" (two slices) or "h100:8" names.

    Raises:
      ValueError: there are none.
    """
    slices = re.match(r"([1-9]\d*)x(?=[a-z])", text)
    name, _, shape = text[slices.end() if slices else 0 :].partition(":")
    if name not in CHIPS:
        raise ValueError(f"--on {text}: there is no chip {name!r}; those known are {', '.join(CHIPS)}")
    chip, sizes = CHIPS[name], shape.split("x")
    example = {0: "8", 2: "4x4", 3: "4x4x4"}[chip.dims]
    if len(sizes) != max(chip.dims, 1) or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--on {text}: say how many chips there are as --on {name}:{example}")
    if slices and not chip.dims:
        raise ValueError(f"--on {text}: slices are of TPUs; GPUs are one number, as in {name}:16")
    target = Target(text.removeprefix("1x"), chip, tuple(map(int, sizes)), int(slices[1]) if slices else 1)
    if not chip.dims and target.num_devices > GPUS_PER_HOST and target.num_devices % GPUS_PER_HOST:
        raise ValueError(f"--on {text}: hosts have {GPUS_PER_HOST} GPUs; take a multiple of that")
    return target


def parse_mesh(text: str) -> dict[str, int]:
    """Returns the axes that "data=64,model=4" names.

    Raises:
      ValueError: it is not of this form.
    """
    axes = {}
    for part in filter(None, text.split(",")):
        name, _, size = part.partition("=")
        if not size.removeprefix("-").isdigit() or name in axes:
            raise ValueError(f"--mesh {text}: write AXIS=SIZE once for each axis, e.g. --mesh data=64,model=4")
        axes[name] = int(size)
    return axes
