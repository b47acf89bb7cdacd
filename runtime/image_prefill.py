"""`ImagePrefiller`: pictures to the embeddings that stand for them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from torch import Tensor

from triptych.errors import RunError
from triptych.runtime.entry_points import EntryPoints
from triptych.runtime.method_runner import MethodRunner
from triptych.runtime.segments import ImageSegment

CACHED_IMAGES: Final = 16


class ImagePrefiller:
    """Runs the image encoder, once for equal pixels: the features of the last pictures are kept.

    An encoder that writes state gives no features; it runs each time, as another picture may have been there since.
    """

    def __init__(self, runner: MethodRunner, entry_points: EntryPoints, cached_images: int = CACHED_IMAGES) -> None:
        """Encode on `runner` and keep the features of at most `cached_images` pictures."""
        self._runner = runner
        self._encoder = entry_points.image_encoder
        self._cached_images = cached_images
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def features(self, segment: ImageSegment) -> Tensor:
        """Return the picture's embeddings, [T, D].

        Raises `RunError` on a text-only program or where the encoder gives another number of embeddings than
        the segment takes positions.
        """
        encoder = self._checked_encoder()
        if segment.key in self._features:
            self._features.move_to_end(segment.key)
            return self._features[segment.key]
        embeds = self._runner.run(encoder, pixel_values=segment.pixel_values)["embeds"]
        embeds = embeds.reshape(-1, embeds.shape[-1])
        if embeds.shape[0] != segment.length:
            raise RunError(
                f"{encoder} gave {embeds.shape[0]} embeddings for an image of {segment.length} positions; "
                "export the model again"
            )
        self._features[segment.key] = embeds
        while len(self._features) > self._cached_images:
            self._features.popitem(last=False)
        return embeds

    def write(self, segment: ImageSegment) -> None:
        """Let the encoder write the picture into the state; raises `RunError` on a text-only program."""
        self._runner.run(self._checked_encoder(), pixel_values=segment.pixel_values)

    def _checked_encoder(self) -> str:
        if self._encoder is None:
            raise RunError("an image was given to a text-only program; leave it out")
        return self._encoder
