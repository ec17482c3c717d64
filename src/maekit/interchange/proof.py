"""Proofs of a conversion: what was written is read again, and the library it is for runs it beside ours.

Both models get the same images, and for an autoencoder the same noise; the largest difference is measured relative to
max(1, largest absolute value of the output), in float32. Where the library is not installed, or never can be from a
package index (detectron2, the authors' code), names, shapes and values are read back and compared bit by bit.
"""

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from maekit.errors import MaekitError, clean
from maekit.interchange.reading import Hints, Reading
from maekit.interchange.weights import as_classifier, as_model, read_weights
from maekit.model.encoder import create_encoder, geometry
from maekit.model.heads import encoder_spec
from maekit.model.targets import PIXELS

TOLERANCE = 1e-5
"""float32 sums in another order: 1e-6 measured for ViT-B (docs/parity.md)."""


class Proof(NamedTuple):
    """What was compared.

    Attributes:
        how: in words: which library, which outputs; or why it did not run.
        difference: the largest, relative to max(1, largest absolute value); 0 for bits that were compared.
        tolerance: its limit.
    """

    how: str
    difference: float
    tolerance: float


def prove(reading: Reading, place: Path, to: str) -> Proof:
    """Read back what was written for a library, and run it there if it is installed.

    Args:
        reading: what was written.
        place: the file or folder.
        to: "official" | "timm" | "transformers" | "detectron2" | "safetensors".

    Raises:
        MaekitError: E-CKPT-PARITY if a tensor came back otherwise, or the difference is above the tolerance.
    """
    count = _read_back(reading, place, to)
    runners: dict[str, Callable[[Reading, Path], tuple[str, float]]] = {"timm": _timm, "transformers": _transformers}
    back = f"{count} tensors read back bit by bit"
    if to not in runners:
        why = {"official": "the authors' code is no package", "detectron2": "detectron2 is not on the package index"}
        return Proof(f"{back}; {why[to]}, so it did not run there" if to in why else back, 0.0, 0.0)
    if importlib.util.find_spec(to) is None:
        return Proof(f"{back}; {to} is not installed, so it did not run there", 0.0, 0.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library, to its own users
            how, difference = runners[to](reading, place)
    except ImportError as error:
        return Proof(f"{back}; {to} cannot be imported ({clean(error, 100)}), so it did not run there", 0.0, 0.0)
    if not difference <= TOLERANCE:
        raise MaekitError(
            "E-CKPT-PARITY",
            f"{how}: nothing was written",
            found=f"a largest difference of {difference:.2g}",
            expected=f"at most {TOLERANCE:g}",
            hint="maekit doctor, and another release of the library",
        )
    return Proof(f"{how}; {back}", difference, TOLERANCE)


def _read_back(reading: Reading, place: Path, to: str) -> int:
    """Compare bit by bit what the layout holds; return how many of our tensors that is."""
    spec = reading.spec
    heads = spec["num_heads"] or geometry(spec["name"]).heads
    size = (spec["img_size"][0], spec["img_size"][1])
    decoder = spec["decoder_heads"] if reading.kind == "mae" and to not in ("timm", "detectron2") else None
    target = spec["target"] if spec["target"] in PIXELS else None  # no other layout has others, nor a word for them
    again = read_weights(place, Hints(None, heads, decoder, target, size))
    mine = reading.whole()
    made = {_whole(again, row.ours) for row in again.rows if row.what == "created"}
    theirs = {name: value for name, value in again.whole().items() if name not in made}
    # a layout without class token has no row for it either
    mine |= {name: mine[name][:, -theirs[name].shape[1] :] for name in theirs if name.endswith("pos_embed")}
    wrong = [name for name, value in theirs.items() if name not in mine or not torch.equal(value, mine[name])]
    if wrong:
        raise MaekitError("E-CKPT-PARITY", f"{place}", found=f"{wrong[0]} read back otherwise than it was written")
    return len(theirs)


def _whole(reading: Reading, name: str) -> str:
    return name if reading.kind == "mae" or name.startswith("encoder.") else f"encoder.{name}"


def _images(spec: dict[str, Any]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, spec["in_chans"], *spec["img_size"], generator=generator)


@torch.no_grad()
def _timm(reading: Reading, place: Path) -> tuple[str, float]:
    """Compare all tokens, or the logits of a classifier."""
    theirs: Any = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
    images = _images(reading.spec)
    if reading.kind == "classifier":
        return f"timm {timm.__version__}: logits", _difference(as_classifier(reading).model(images), theirs(images))
    return f"timm {timm.__version__}: all tokens", _difference(
        _tokens(reading, images), theirs.forward_features(images)
    )


@torch.no_grad()
def _transformers(reading: Reading, place: Path) -> tuple[str, float]:
    """Compare masks, predictions and loss of an autoencoder, all tokens of an encoder, logits of a classifier."""
    import transformers

    library: Any = transformers
    library.utils.logging.disable_progress_bar()
    images, version = _images(reading.spec), f"transformers {library.__version__}"
    if reading.kind == "classifier":
        theirs = library.ViTForImageClassification.from_pretrained(place).eval()
        return f"{version}: logits", _difference(as_classifier(reading).model(images), theirs(images).logits)
    if reading.kind == "encoder":
        theirs = library.ViTMAEModel.from_pretrained(place, mask_ratio=0.0).eval()
        num_patches = theirs.embeddings.patch_embeddings.num_patches
        in_order = torch.arange(num_patches).expand(2, -1) / num_patches  # it shuffles even what it does not mask
        found = theirs(images, noise=in_order).last_hidden_state
        return f"{version}: all tokens", _difference(_tokens(reading, images), found)
    ours, theirs = as_model(reading), library.ViTMAEForPreTraining.from_pretrained(place).eval()
    noise = torch.rand(2, ours.num_patches, generator=torch.Generator().manual_seed(1))
    found, expected = theirs(images, noise=noise), ours(images, theirs.config.mask_ratio, noise=noise)
    parts = [
        (expected.pred, found.logits),
        (expected.loss, found.loss),
        (expected.mask.float(), found.mask.float()),
        (expected.ids_restore.float(), found.ids_restore.float()),
    ]
    return f"{version}: prediction, loss, mask and order", max(_difference(one, other) for one, other in parts)


def _tokens(reading: Reading, images: Tensor) -> Tensor:
    """Return all tokens after the final norm, of the encoder of an autoencoder too."""
    encoder = create_encoder(**encoder_spec(reading.spec)).eval()
    encoder.load_state_dict({name[8:]: value for name, value in reading.whole().items() if name.startswith("encoder.")})
    return encoder.forward_features(images)


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    return float((ours - theirs).abs().max()) / max(1.0, float(ours.abs().max()))
