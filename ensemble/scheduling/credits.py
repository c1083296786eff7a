"""The router's ledger of one replica: what it may still send there without asking."""

from ensemble.errors import InternalError


class Credits:
    """Blocks of one replica's pool, held by request from dispatch until the replica reports the release."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_blocks = num_blocks
        self._held: dict[int, int] = {}  # request_id |-> blocks

    @property
    def num_requests(self) -> int:
        return len(self._held)

    @property
    def request_ids(self) -> list[int]:
        """Requests that hold credit, in the order in which they took it."""
        return list(self._held)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._held

    def fits(self, num_blocks: int) -> bool:
        return num_blocks <= self.free_blocks

    def held(self, request_id: int) -> int:
        """Blocks that the request holds."""
        return self._held.get(request_id, 0)

    def hold(self, request_id: int, num_blocks: int) -> None:
        """Spends credit. Raises InternalError if it does not fit or the request already holds some."""
        if request_id in self._held or not self.fits(num_blocks):
            raise InternalError(f"request {request_id} cannot hold {num_blocks} blocks: {self.free_blocks} are free")
        self._held[request_id] = num_blocks
        self.free_blocks -= num_blocks

    def release(self, request_id: int) -> int:
        """Takes the request's credit back and returns its blocks, 0 if it holds none."""
        num_blocks = self._held.pop(request_id, 0)
        self.free_blocks += num_blocks
        return num_blocks

    def check_integrity(self) -> None:
        """Raises InternalError unless free and held blocks make up the pool."""
        held = sum(self._held.values())
        if self.free_blocks < 0 or self.free_blocks + held != self.num_blocks:
            raise InternalError(f"credit of {self.num_blocks} blocks: {self.free_blocks} free, {held} held")
