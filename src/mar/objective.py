"""What the training loop asks of a stage and of its data.

Does: define the parameter group, and the protocols `Objective` (what trains, on which loss) and `Rows` (packed text
with an exact position). Does not: train, or know any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train with the same settings.

    name: unique in its stage; with the parameter's own name it labels checkpoints and error messages.
    parameters: name → parameter in fp32; a parameter belongs to one group only.
    lr_scale: factor on the learning rate of the run.
    weight_decay: of every parameter here; None takes the run's value for matrices and 0 for vectors and scalars,
        because norms, biases and log-thresholds are no weights that should shrink.
    clip: groups that share this tag have their gradients clipped together, by one norm.
    muon: whether the 2-D weights here train with Muon when the run's optimizer is `muon` (embeddings should not).
    """

    name: str
    parameters: dict[str, nn.Parameter]
    lr_scale: float = 1.0
    weight_decay: float | None = None
    clip: str = "all"
    muon: bool = False


class Objective(Protocol):
    """A stage as the loop sees it."""

    @property
    def name(self) -> str:
        """The stage's name, for the progress bar and error messages."""
        ...

    def parameter_groups(self) -> list[ParameterGroup]:
        """Everything that training changes, in the same order with the same names in every run of the stage."""
        ...

    def accumulate(self, batch: dict[str, Tensor], backward: Callable[[Tensor], None]) -> dict[str, float]:
        """Compute the loss of one micro batch and hand it to `backward`, once or in parts (say, layer by layer).

        Runs under the autocast of the run; `backward` itself does not, and divides by the accumulation. Returns
        metrics, all finite and with the same keys at every step; unless they hold a `loss`, the loop adds the sum of
        the parts.
        """
        ...


class Rows(Protocol):
    """Packed rows of equal length with an exact position."""

    @property
    def length(self) -> int:
        """Tokens a row."""
        ...

    def shard(self, rank: int, world: int) -> Any:
        """From now on yield only the rows i of the global stream with i mod world = rank; called before any batch."""
        ...

    def batches(self, batch_size: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `batch_size` rows, `input_ids` among them, from the current position to the end of the data.

        Called again after that, start over. The loop passes over a last batch that is smaller.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was handed out, as JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that `state_dict` gave."""
        ...
