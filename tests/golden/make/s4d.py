"""Golden layer: S4D as a convolution, in torch.

Written from the paper (https://arxiv.org/abs/2206.11893, listing 1 and section 3: zero-order hold, S4D-Lin, conjugate
pairs) and the semantics of its published reference, `models/s4/s4d.py` of state-spaces/s4 (input weights of one, GELU,
a pointwise linear layer into a GLU). The kernel of all T steps is materialised as a Vandermonde product and applied by
FFT: nothing in common with a recurrence.
"""

import torch
from common import draw, generator, module_case
from parameters import parameters

B, T, D, N = 2, 67, 6, 8

SETTINGS = {"hidden_size": D, "d_state": N}


class S4D(torch.nn.Module):
    def __init__(self):
        super().__init__()
        empty = lambda *shape: torch.nn.Parameter(torch.empty(shape))
        self.log_dt = empty(D)
        self.log_A_real, self.A_imag = empty(D, N // 2), empty(D, N // 2)
        self.C = empty(D, N // 2, 2)
        self.D = empty(D)
        self.output_linear = torch.nn.Linear(D, 2 * D)

    def forward(self, u_btd):
        A = torch.complex(-torch.exp(self.log_A_real), self.A_imag)
        dtA = torch.exp(self.log_dt)[:, None] * A
        C = torch.view_as_complex(self.C) * (torch.exp(dtA) - 1) / A
        vandermonde = torch.exp(dtA[..., None] * torch.arange(T))
        kernel_dt = 2 * torch.einsum("dn,dnt->dt", C, vandermonde).real
        u_bdt = u_btd.transpose(1, 2)
        # Twice as long: the FFT's convolution is circular.
        spectrum = torch.fft.rfft(kernel_dt, n=2 * T) * torch.fft.rfft(u_bdt, n=2 * T)
        y_bdt = torch.fft.irfft(spectrum, n=2 * T)[..., :T] + self.D[:, None] * u_bdt
        y = torch.nn.functional.gelu(y_bdt.transpose(1, 2))
        return torch.nn.functional.glu(self.output_linear(y))


def drawn(name, rng, shape):
    """Steps of about 1/20 and frequencies up to 30: oscillators that turn by up to 1.5 a token."""
    if name == "log_dt":
        return draw(rng, *shape, scale=0.5) - 3
    if name == "A_imag":
        return abs(draw(rng, *shape, scale=15.0))
    if name == "log_A_real":
        return draw(rng, *shape, scale=0.5)
    if name == "C":
        return draw(rng, *shape)
    return parameters(name, rng, shape)


def main() -> None:
    module_case(
        "layer_s4d",
        S4D,
        lambda apply, x: apply(x),
        draw(generator("layer_s4d"), B, T, D),
        drawn,
        settings=SETTINGS,
        source="the convolution of arXiv 2206.11893, in torch",
    )


if __name__ == "__main__":
    main()
