"""Features kept on disk, so that another look at the same ones takes seconds.

An entry is one safetensors file: values and indices of one layer and pooling over one set of images. Its name is a
digest of all that decides the values: the encoder's weights, the images (names, sizes, places and times of change), how
they are shown, layer, pooling, kind of device, version. The values carry a digest of their own; an entry that is not
what was written is computed anew. Labels are not kept: they are the source's. The folder may be deleted at any time.
"""

import contextlib
import hashlib
import json
import logging
import uuid
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maekit import __version__
from maekit.data.augment import default_crop_pct
from maekit.data.sources import Source
from maekit.errors import MaekitError, clean
from maekit.model.mae import MaskedAutoencoder
from maekit.train.checkpoint import state_sha256

log = logging.getLogger("maekit")

FOLDER = "features"
"""In a run folder, unless ``--cache`` says otherwise."""


class FeatureCache:
    """A folder of features.

    Args:
        folder: made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, model: MaskedAutoencoder, source: Source, device: str) -> dict[str, Any] | None:
        """Return what decides the features of these images beside layer and pooling; None: these can't be kept."""
        changes = changes_of(source)
        if changes is None:
            return None
        return {
            "maekit": __version__,
            "weights": state_sha256({"encoder": model.encoder.state_dict()}, {}),
            "images": source.fingerprint(),
            "changes": changes,
            "size": list(model.img_size),
            "crop_pct": default_crop_pct(model.img_size),
            "mean": list(model.mean),
            "std": list(model.std),
            "device": device,
            "dtype": "float32",
        }

    def read(self, key: dict[str, Any], layer: int, pool: str) -> tuple[Tensor, Tensor] | None:
        """Return values (n, D) and index (n,), or None where there are none that verify."""
        path, about = self._entry(key, layer, pool)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                said, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if said.get("about") != about or said.get("sha256") != state_sha256({"features": tensors}, {}):
                raise ValueError("other values than were written (SHA-256)")
            return tensors["values"], tensors["index"]
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged, its features are computed anew: %s", path, clean(error))
            return None

    def write(self, key: dict[str, Any], layer: int, pool: str, values: Tensor, index: Tensor) -> None:
        """Keep an entry, whole or not at all; where nothing can be written, it is said and that is all."""
        path, about = self._entry(key, layer, pool)
        tensors = {"values": values.contiguous(), "index": index.contiguous()}
        metadata = {"about": about, "sha256": state_sha256({"features": tensors}, {})}
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(tensors, temporary, metadata)
            temporary.replace(path)
        except (OSError, SafetensorError) as error:
            log.warning("features are not kept, %s cannot be written: %s", path, clean(error))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _entry(self, key: dict[str, Any], layer: int, pool: str) -> tuple[Path, str]:
        about = json.dumps({**key, "layer": layer, "pool": pool}, sort_keys=True)
        digest = hashlib.sha256(about.encode()).hexdigest()[:32]
        return self.folder / f"block-{layer}-{pool}-{digest}.safetensors", about


def changes_of(source: Source) -> str | None:
    """Return a digest that differs when any image has changed, also to one of equal size; None: nothing tells."""
    stamps = source.stamps()
    if stamps is None:
        return None
    changes = hashlib.sha256()
    for stamp in stamps:
        changes.update(b"\0" + stamp.encode("utf-8", "surrogateescape"))
    return changes.hexdigest()


def data_digest(source: Source) -> str:
    """Return a digest of images (names, sizes, times of change), labels and classes."""
    told = [
        source.fingerprint(),
        changes_of(source),
        None if source.labels is None else list(source.labels),
        source.classes,
    ]
    return hashlib.sha256(json.dumps(told).encode("utf-8", "surrogatepass")).hexdigest()


def open_cache(settings: Any) -> FeatureCache | None:
    """Return the cache that ``--cache`` names: RUN/features where RUN is a run folder and nothing is said.

    Raises:
        MaekitError: E-CONFIG-OUT if it is a file.
    """
    if settings.cache is None or settings.run is None:
        return None
    if settings.cache == "auto":
        return FeatureCache(settings.run / FOLDER) if (settings.run / "config.yaml").is_file() else None
    folder = Path(settings.cache)
    if folder.exists() and not folder.is_dir():
        raise MaekitError("E-CONFIG-OUT", f"--cache {folder}", found="a file", expected="a folder, or nothing yet")
    return FeatureCache(folder)
