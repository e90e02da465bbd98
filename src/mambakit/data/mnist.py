"""MNIST and Fashion-MNIST from the official IDX files, as sequences of 784 pixels.

    classification   784 float pixels, one per step -> 10 classes   (LeCun et al. 1998; Xiao et al. 2017)
    pixels           784 tokens of 256 values; position t predicts pixel t from the pixels before it

The second is the annotated S4's sequence-modelling task: the input is the image shifted right by one, with
black in front, so the loss covers all 784 pixels, and divided by ln 2 it is the bits per pixel.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import math
import zlib
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from mambakit.config import unknown
from mambakit.data.config import Baseline, DataConfig, DataError
from mambakit.data.fetch import RemoteFile, locate
from mambakit.data.samples import Epochs, Samples

PIXELS = 784
_PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def read_idx(path: str | Path) -> np.ndarray:
    """Read an IDX file of bytes, packed with gzip or not.

    An IDX file is two zero bytes, the type (8: unsigned byte), the number of axes, each axis as a big-endian
    32-bit integer, and the values (LeCun, "The MNIST database", file formats).

    Args:
        path: The file; packed if its name ends in `.gz`.

    Returns:
        The array, uint8, in the file's own shape.

    Raises:
        DataError: The file is not IDX, is of another type, is cut short, or has something after its end.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{str(path)!r} is not an IDX file of bytes: it starts with {content[:4].hex(' ')}")
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{str(path)!r} ends inside its header, after {len(content)} bytes")
    shape = tuple(np.frombuffer(content[4:header], dtype=">u4").tolist())
    if len(content) - header != math.prod(shape):
        raise DataError(f"{str(path)!r} has {len(content) - header} values, its header says {shape}")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


class Images(Samples):
    """Labelled images as sequences of pixels for a classifier.

    Args:
        images: (n, 784) uint8.
        labels: (n,) uint8.
        mean: Mean of the training pixels, of 1.
        deviation: Their standard deviation, of 1.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: float, deviation: float) -> None:
        super().__init__(len(images))
        self._images = images
        self._labels = labels
        self._values = ((np.arange(256) / 255 - mean) / deviation).astype(np.float32)

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples numbered `indices`: inputs (b, 784, 1) float32 and label (b,) int64."""
        return {
            "inputs": self._values[self._images[indices]][..., None],
            "label": self._labels[indices].astype(np.int64),
        }


class Pixels(Samples):
    """Images as sequences of tokens for a language model.

    Args:
        images: (n, 784) uint8.
    """

    def __init__(self, images: np.ndarray) -> None:
        super().__init__(len(images))
        self._images = images

    def generate(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Make the samples numbered `indices`: tokens and labels, (b, 784) int64."""
        labels = self._images[indices].astype(np.int64)
        tokens = np.zeros_like(labels)
        tokens[:, 1:] = labels[:, :-1]
        return {"tokens": tokens, "labels": labels}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MnistConfig(DataConfig, tag="mnist"):
    """MNIST: 60,000 + 10,000 handwritten digits of 28 x 28 grey pixels.

    The official test images are the evaluation `"test"`. Validation takes the last `held_out` training
    images, so that nothing is chosen by the test.

    Attributes:
        mode: `"classification"` or `"pixels"` (see the top of this file).
        held_out: Training images kept for validation. 0 trains on all 60,000 and validates on the test
            images: then take the last model, not the best one.
    """

    mode: Literal["classification", "pixels"] = "classification"
    held_out: int = 5_000

    # Mean and standard deviation of the 60,000 training images' pixels.
    statistics: ClassVar[tuple[float, float]] = (0.1307, 0.3081)
    # Measured with the official split: accuracy of the nearest class mean, and nats per pixel of one
    # table of 256 counts per position, 0.1 added to each.
    class_mean_accuracy: ClassVar[float] = 0.8203
    unigram_loss: ClassVar[float] = 1.170
    folder: ClassVar[str] = "mnist"
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    )
    digests: ClassVar[tuple[str, ...]] = (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    )

    def __post_init__(self) -> None:
        if self.mode not in ("classification", "pixels"):
            raise ValueError(unknown("mode", self.mode, ("classification", "pixels")))
        if self.held_out < 0:
            raise ValueError(f"held_out is {self.held_out}, expected at least 0")

    @property
    def vocab_size(self) -> int | None:
        """256 grey values in mode `"pixels"`."""
        return 256 if self.mode == "pixels" else None

    @property
    def n_classes(self) -> int | None:
        """10 in mode `"classification"`."""
        return 10 if self.mode == "classification" else None

    @property
    def in_features(self) -> int | None:
        """One grey value per step in mode `"classification"`."""
        return 1 if self.mode == "classification" else None

    @property
    def chance(self) -> float | None:
        """1 in 10 classes."""
        return 0.1 if self.mode == "classification" else None

    @property
    def baseline(self) -> Baseline:
        """Nearest class mean, or a table of grey values per position."""
        if self.mode == "classification":
            return Baseline("nearest class mean", "accuracy", self.class_mean_accuracy)
        return Baseline("unigram table per position", "loss", self.unigram_loss)

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, ...]:
        """Training images (60000, 784), training labels, test images (10000, 784), test labels; uint8."""
        paths = [
            locate(RemoteFile(self.folder, f"{part}.gz", digest, self.mirrors))
            for part, digest in zip(_PARTS, self.digests, strict=True)
        ]
        arrays = [_labelled(*paths[:2]), _labelled(*paths[2:])]
        if self.held_out >= len(arrays[0][0]):
            raise DataError(f"held_out is {self.held_out}, there are {len(arrays[0][0])} training images")
        return (*arrays[0], *arrays[1])

    def _samples(self, images: np.ndarray, labels: np.ndarray) -> Samples:
        return Pixels(images) if self.mode == "pixels" else Images(images, labels, *self.statistics)

    def train(self, seed: int) -> Epochs:
        """The training images but for those held out, every epoch in its own order."""
        images, labels = self._arrays[:2]
        kept = len(images) - self.held_out
        return Epochs(self._samples(images[:kept], labels[:kept]), seed)

    def validation(self) -> Samples:
        """The held-out training images, or the test images where none are held out."""
        if self.held_out == 0:
            return self.evaluations()["test"]
        images, labels = self._arrays[:2]
        return self._samples(images[-self.held_out :], labels[-self.held_out :])

    def evaluations(self) -> dict[str, Samples]:
        """The official test images, `"test"`."""
        return {"test": self._samples(*self._arrays[2:])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(MnistConfig, tag="fashion-mnist"):
    """Fashion-MNIST: 60,000 + 10,000 pictures of clothes in MNIST's format (Xiao, Rasul and Vollgraf 2017).

    Attributes:
        mode: As in `MnistConfig`.
        held_out: As in `MnistConfig`.
    """

    statistics: ClassVar[tuple[float, float]] = (0.2860, 0.3530)
    class_mean_accuracy: ClassVar[float] = 0.6768
    unigram_loss: ClassVar[float] = 3.180
    folder: ClassVar[str] = "fashion-mnist"
    mirrors: ClassVar[tuple[str, ...]] = (
        "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    )
    digests: ClassVar[tuple[str, ...]] = (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    )


def _labelled(image_path: Path, label_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images and their labels, and check that they belong together."""
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28) or len(images) == 0:
        raise DataError(f"{str(image_path)!r} has shape {images.shape}, expected (n, 28, 28)")
    if labels.shape != (len(images),):
        raise DataError(
            f"{str(label_path)!r} has shape {labels.shape}, expected one label for {len(images)} images"
        )
    if labels.max() > 9:
        raise DataError(f"{str(label_path)!r} has a label {labels.max()}, expected 0 to 9")
    return images.reshape(len(images), PIXELS), labels
