"""Bounds the memory of images that several threads decode at the same time.

    gate = ImageGate()
    with gate.reading(lambda: index.read_image(12)) as data:   # waits until there is room
        preview = eval_transform(data, 320)

An image of 100 megapixels takes 1 GB while it is decoded. Small images pass together; large ones come one after
the other, in the order of the requests. A thread that waits holds the encoded image at most.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

from priorclip.data_shards.images.decode import MAX_PIXELS, count_pixels

READERS = 4  # threads that read files at the same time, or wait with what they read
PILLOW_BLOCK = 64 << 20  # bytes. malloc returns such blocks to the system; it kept 2.5 GB of Pillow's 16 MB in threads
BYTES_A_PIXEL = 3  # a file without many pixels, but with many bytes, counts as such an image


class ImageGate:
    """Lets images through as long as all images inside have at most ``limit`` pixels together."""

    def __init__(self, limit: int = MAX_PIXELS) -> None:
        Image.core.set_block_size(PILLOW_BLOCK)
        self.limit = limit
        self._used = 0
        self._readers = threading.BoundedSemaphore(READERS)
        self._turn = threading.Lock()
        self._changed = threading.Condition()

    @contextmanager
    def reading(self, read: Callable[[], bytes]) -> Iterator[bytes]:
        """Yields the encoded image that ``read`` returns, as soon as there is room to decode it.

        Raises what ``read`` raises, and BadSample if the image has no readable header or too many pixels.
        """
        with self._readers:
            data = read()
            cost = min(self.limit, max(count_pixels(data), len(data) // BYTES_A_PIXEL))
            with self._turn, self._changed:
                self._changed.wait_for(lambda: self._used + cost <= self.limit)
                self._used += cost
        try:
            yield data
        finally:
            with self._changed:
                self._used -= cost
                self._changed.notify_all()
