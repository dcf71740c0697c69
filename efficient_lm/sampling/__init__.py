"""How a trained model is used."""

from efficient_lm.sampling.autoregressive import SamplingConfig as SamplingConfig
from efficient_lm.sampling.autoregressive import generate as generate
