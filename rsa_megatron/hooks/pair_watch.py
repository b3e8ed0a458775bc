"""Says it where RSA is on and, iteration after iteration, has nothing to compare: its loss of 0 would look like success."""

from megatron.core.num_microbatches_calculator import get_num_microbatches


class PairWatch:
    """Counts the iterations since there was anything to compare.

    Args:
        interval: iterations in a row after which a warning is due, and due again.
    """

    def __init__(self, interval: int):
        self._interval = interval
        self._forget()

    def _forget(self) -> None:
        self._num_iterations, self._had_pair = 0.0, False

    def add(self, num_pairs: int, num_compared: int, weight: float) -> str | None:
        """Take note of a micro-batch of training; return the warning if it is due.

        Args:
            num_pairs: those of the micro-batch, of all ranks.
            num_compared: with those of earlier micro-batches that they are compared with (--rsa-scope).
        """
        if num_compared > 1 and num_pairs:
            self._forget()
            return None
        self._had_pair |= num_pairs > 0
        self._num_iterations += 1 / _num_micro_batches()
        if self._num_iterations < self._interval - 1e-6:  # a sum of fractions
            return None
        had_pair = self._had_pair
        self._forget()
        start = f"WARNING: RSA is on (--rsa-weight {weight:g}), but in the last {self._interval} iterations"
        if had_pair:
            return (
                f"{start} no pair had another to be compared with: raise --micro-batch-size (of packed rows --seq-length), use more "
                "data-parallel ranks, or --rsa-scope global-batch"
            )
        return (
            f"{start} there was no pair: look for samples with exactly one image, in data sets with `subflavors: {{rsa: true}}` "
            "(or that RSAPlugin's select lets in), whose captions are not cut off by --seq-length; or turn RSA off (--rsa-weight 0)"
        )


def _num_micro_batches() -> int:
    try:
        return get_num_microbatches()
    except AttributeError:  # a job without Megatron's calculator: a micro-batch counts as an iteration
        return 1
