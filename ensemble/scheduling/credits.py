"""The scheduler's ledger of one replica: what it may still send there without asking."""

from ensemble.errors import InternalError


class Credits:
    """Blocks and places of one replica, held by request from dispatch until the replica reports the release."""

    def __init__(self, num_blocks: int, max_num_seqs: int | None = None) -> None:
        self.num_blocks = num_blocks
        self.max_num_seqs = max_num_seqs  # None: only blocks are limited
        self.free_blocks = num_blocks
        self._held: dict[int, int] = {}  # request_id |-> blocks

    @property
    def num_seqs(self) -> int:
        return len(self._held)

    @property
    def request_ids(self) -> list[int]:
        """Requests that hold credit, in the order in which they took it."""
        return list(self._held)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._held

    def fits(self, num_blocks: int) -> bool:
        """Whether one more sequence of `num_blocks` blocks has room."""
        return num_blocks <= self.free_blocks and (self.max_num_seqs is None or self.num_seqs < self.max_num_seqs)

    def hold(self, request_id: int, num_blocks: int) -> None:
        """Spends credit. Raises InternalError if it does not fit or the request already holds some."""
        if request_id in self._held or not self.fits(num_blocks):
            raise InternalError(
                f"request {request_id} cannot hold {num_blocks} blocks:"
                f" {self.free_blocks} free, {self.num_seqs} of {self.max_num_seqs} sequences"
            )
        self._held[request_id] = num_blocks
        self.free_blocks -= num_blocks

    def release(self, request_id: int) -> int:
        """Takes the request's credit back and returns its blocks. Raises InternalError if it holds none."""
        num_blocks = self._held.pop(request_id, None)
        if num_blocks is None:
            raise InternalError(f"request {request_id} holds no credit")
        self.free_blocks += num_blocks
        return num_blocks

    def check_integrity(self) -> None:
        """Raises InternalError unless free and held blocks make up the pool."""
        held = sum(self._held.values())
        if self.free_blocks < 0 or self.free_blocks + held != self.num_blocks:
            raise InternalError(f"credit of {self.num_blocks} blocks: {self.free_blocks} free, {held} held")
        if self.max_num_seqs is not None and self.num_seqs > self.max_num_seqs:
            raise InternalError(f"credit of {self.max_num_seqs} sequences: {self.num_seqs} held")
