"""A set of digests in few bytes each: what a pass over the data remembers of every row it has seen."""

from array import array


class DigestSet:
    """64-bit digests in one table of machine words, of which at most two thirds are taken.

    A digest costs 12 to 24 bytes, 36 at the moment in which the table doubles; as a text in a `set` it would cost some 150.

    >>> seen = DigestSet()
    >>> seen.add(7), seen.add(7), 7 in seen, 8 in seen, len(seen)
    (True, False, True, False, 1)
    """

    def __init__(self) -> None:
        self._table = array("Q", bytes(8 * 1024))  # 0 is a place that is free
        self._count = 0

    def add(self, digest: int) -> bool:
        """Put a digest in; whether it was new."""
        place = self._place(digest)
        if self._table[place]:
            return False
        self._table[place] = digest or 1
        self._count += 1
        if 3 * self._count > 2 * len(self._table):
            self._double()
        return True

    def __contains__(self, digest: int) -> bool:
        return bool(self._table[self._place(digest)])

    def __len__(self) -> int:
        return self._count

    def _place(self, digest: int) -> int:
        # Digests are evenly spread already, so their own low bits say where to begin.
        table, wanted = self._table, digest or 1
        place = wanted % len(table)
        while table[place] not in (0, wanted):
            place = (place + 1) % len(table)
        return place

    def _double(self) -> None:
        held = self._table
        self._table = array("Q", bytes(2 * 8 * len(held)))
        for digest in held:
            if digest:
                self._table[self._place(digest)] = digest
