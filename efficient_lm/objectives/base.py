"""What every objective is: a number to minimise, given as a sum over tokens so that parts of a batch add up."""

import abc
import dataclasses

from jaxtyping import Array, Float

from efficient_lm.data import Batch
from efficient_lm.model import LanguageModel

type Sums = dict[str, Float[Array, ""]]  # Totals over the batch by name; "tokens" says over how many tokens.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(abc.ABC):
    """What the model is trained for."""

    @abc.abstractmethod
    def build(self) -> "Objective": ...


class Objective(abc.ABC):
    @abc.abstractmethod
    def __call__(self, model: LanguageModel, batch: Batch) -> tuple[Float[Array, ""], Sums]:
        """Returns what to minimise, summed over tokens, and the totals to report."""

    @abc.abstractmethod
    def token_nll(self, model: LanguageModel, batch: Batch) -> Float[Array, "B T"]:
        """Returns how many nats each target costs, 0 where there is none; for evaluation."""
