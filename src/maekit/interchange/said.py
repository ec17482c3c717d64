"""What is said of a file of weights beside its tensors: by a configuration, by arguments, by the caller.

Shapes do not tell heads, target and statistics of the images. Where nobody says them, what is usual is taken, and a
note says so; where two say different things, or something that would make the model compute otherwise, it is refused.
"""

import math
from typing import Any, TypeVar

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from maekit.errors import MaekitError, clean
from maekit.interchange.files import File, read_json
from maekit.interchange.reading import Hints, some
from maekit.model.encoder import Geometry, geometry
from maekit.model.targets import PIXELS

T = TypeVar("T")
Size = tuple[int, int]

EPSILON = 1e-6
"""Of every layer norm of the authors' models, timm's and ours."""
MOST_EPSILON = 1e-5
"""Up to which another epsilon is only noted. Of fresh ViT-S and ViT-B, random images: transformers' 1e-12 moves
features by 7e-5 of the largest, 1e-5 by 6e-4, 1e-3 by 2e-2."""
KNOWN_ARGS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_classes", "global_pool", "fc_norm",
    "drop_path_rate", "drop_rate", "weight_init",
}  # fmt: skip
"""timm's ``model_args`` that stand in the shapes, are read here, or matter in training only; another could change what
the model computes."""
TOKEN_ARGS = ("class_token", "reg_tokens", "no_embed_class")
"""timm's ``model_args`` that together say how many class tokens a model of ours has (`maekit.model.variant`)."""
HUGGING = {
    "num_attention_heads": 12, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "qkv_bias": True,
    "decoder_num_attention_heads": 16, "norm_pix_loss": False,
}  # fmt: skip
"""Defaults of transformers' ViTConfig and ViTMAEConfig, which stand for keys that a config.json does not have."""
PROBLEMS = {
    "single_label_classification": "classes", "multi_label_classification": "multilabel", "regression": "regression",
}  # fmt: skip
"""transformers' words for what a classifier's outputs are."""
DECODER_HEAD_WIDTH = 32
"""Width per head of the official decoder: 512 / 16 (models_mae.py)."""


class Said:
    """What is said of one file.

    Attributes:
        notes: what was taken for granted, in words.
    """

    def __init__(self, file: File, hints: Hints) -> None:
        self.path, self.hints, self.notes = file.path, hints, list[str]()
        hugging = file.config.get("model_type") in ("vit", "vit_mae", "vit_msn")
        self.config = {**HUGGING, **file.config} if hugging else file.config
        self.args, self.model_args = _mapping(file.facts, "args"), _mapping(self.config, "model_args")

    def refuse_other_arithmetic(self) -> None:
        """Refuse what the configuration says of a model that computes otherwise, where no tensor would show it.

        Raises:
            MaekitError: E-CKPT-LAYOUT.
        """
        config = self.config
        counted = set(TOKEN_ARGS) if self.class_tokens() is not None else {"class_token"}
        other = sorted(map(str, self.model_args.keys() - KNOWN_ARGS - counted))
        if self.class_tokens() is None and self.model_args.get("class_token", True) is not True:
            other.append("class_token false")
        if "model_type" in config and not HUGGING.keys() <= config.keys():
            other.append(f"model_type {config['model_type']}")
        for name, plain in (("hidden_act", "gelu"), ("qkv_bias", True)):
            if config.get(name, plain) != plain:
                other.append(f"{name} {config[name]}")
        epsilon = _number(config.get("layer_norm_eps"), EPSILON)
        if not 0 <= epsilon <= MOST_EPSILON:
            other.append(f"layer_norm_eps {epsilon:g}")
        if other:
            raise MaekitError(
                "E-CKPT-LAYOUT",
                f"configuration beside {self.path}",
                found=some(other),
                expected="a plain ViT: with it the encoder would compute otherwise than ours",
            )
        if epsilon != EPSILON:
            self.notes.append(
                f"layer norms: an epsilon of {epsilon:g} in the configuration, {EPSILON:g} here, as in the authors' "
                "code (D3)"
            )

    def pool(self, *, has_fc_norm: bool, has_class_token: bool) -> str:
        """Return how a classifier pools; refuse a way that maekit's classifiers do not have.

        Raises:
            MaekitError: E-CKPT-LAYOUT.
        """
        said = self.model_args.get("global_pool", self.config.get("global_pool"))
        fits = said is None or said == ("avg" if has_fc_norm else "token")
        if not fits or not (has_fc_norm or has_class_token):
            raise MaekitError(
                "E-CKPT-LAYOUT",
                f"head of {self.path}",
                found=f"global_pool {said!r} {'with' if has_fc_norm else 'without'} fc_norm",
                expected="a head on the class token after norm, or on the mean of patch tokens before fc_norm",
            )
        return "mean" if has_fc_norm else "cls"

    def name(self) -> str | None:
        """Return timm's name of the architecture."""
        name = self.hints.model or self.config.get("architecture")
        return name.split(".")[0] if isinstance(name, str) else None

    def geometry(self, name: str) -> Geometry:
        """Look a name up.

        Raises:
            MaekitError: E-CONFIG-MODEL for the caller's, E-CKPT-LAYOUT for one in a configuration.
        """
        try:
            return geometry(name)
        except MaekitError as error:
            if self.hints.model:
                raise
            raise MaekitError(
                "E-CKPT-LAYOUT", f"configuration beside {self.path}", found=error.args[0],
                hint="maekit inspect or convert with --model NAME",
            ) from error  # fmt: skip

    def heads(self) -> int | None:
        """Return the encoder's heads, if anyone says them."""
        said = _count(self.config.get("num_attention_heads") or self.model_args.get("num_heads"))
        return self._agreed("num_heads", self.hints.num_heads, said)

    def decoder_heads(self, width: int) -> int:
        """Return the decoder's heads; where nobody says them, as many as make the official width of each."""
        said = _count(self.config.get("decoder_num_attention_heads"))
        heads = self._agreed("decoder_heads", self.hints.decoder_heads, said)
        if heads is None:
            heads = max(1, width // DECODER_HEAD_WIDTH)
            self.notes.append(
                f"{heads} decoder heads, {DECODER_HEAD_WIDTH} values each as in the official decoder: "
                "the file does not say"
            )
        return heads

    def class_tokens(self) -> int | None:
        """Return how many class tokens there are, where all of `TOKEN_ARGS` say so; None: as the architecture has."""
        first, others, apart = (self.model_args.get(name) for name in TOKEN_ARGS)
        if not isinstance(first, bool) or type(others) is not int or apart is not False:
            return None
        return first + others if first or others == 0 else None

    def target(self, has_decoder: bool) -> str:
        """Return what the decoder predicts, or is to predict."""
        said = self.args.get("norm_pix_loss", self.config.get("norm_pix_loss") if has_decoder else None)
        target = {True: "norm_pixel", False: "pixel"}.get(said) if isinstance(said, bool) else None
        target = self._agreed("target", self.hints.target, target)
        if target is None and has_decoder:
            self.notes.append(
                "target norm_pixel, the paper's best: the file does not say (the authors' demo weights predict pixels)"
            )
        return target or PIXELS[0]

    def size(self) -> tuple[Size | None, bool]:
        """Return height and width of the images, and whether shapes must agree with them."""
        said = _size(self.config.get("image_size")) or _size(self.model_args.get("img_size"))
        said = self._agreed("source_size", self.hints.img_size, said or _size(self.args.get("input_size")))
        usual = _size(_mapping(self.config, "pretrained_cfg").get("input_size"))
        return said or usual, said is not None

    def statistics(self, channels: int) -> tuple[list[float], list[float]]:
        """Return mean and deviation of the images, in units of 0..1."""
        said = _mapping(self.config, "pretrained_cfg")
        mean, std = _numbers(said.get("mean"), channels), _numbers(said.get("std"), channels)
        beside = self.path.parent / "preprocessor_config.json"
        if "model_type" in self.config and beside.is_file():
            mean, std = _of_processor(read_json(beside), channels)
        if mean and std and min(std) > 0:
            return mean, std
        if channels == 3:
            self.notes.append("images normalised with ImageNet's mean and deviation: the file does not say")
            return list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        self.notes.append("images normalised with mean .5 and deviation .5: the file does not say")
        return [0.5] * channels, [0.5] * channels

    def classes(self, count: int) -> list[str]:
        """Return the names of the classes where the configuration has all of them."""
        labels = _mapping(self.config, "id2label")
        names: Any = [labels.get(str(at)) for at in range(count)]
        if not labels:
            names = _mapping(self.config, "pretrained_cfg").get("label_names") or self.config.get("label_names")
        good = isinstance(names, list) and len(names) == count and all(isinstance(name, str) for name in names)
        return [clean(name, 200) for name in names] if good and names[:1] != ["LABEL_0"] else []

    def task(self) -> str:
        """Return what a classifier's outputs are: one class an image where nothing is said."""
        return PROBLEMS.get(str(self.config.get("problem_type")), "classes")

    def _agreed(self, name: str, hint: T | None, said: T | None) -> T | None:
        if hint is not None and said is not None and hint != said:
            raise contradiction(name, hint, f"{said}, as stands beside {self.path}")
        return said if hint is None else hint


def contradiction(name: str, found: object, expected: str) -> MaekitError:
    """Return the error for a hint that the file itself contradicts."""
    return MaekitError(
        "E-CONFIG-HINT", f"setting {name}", found=found, expected=expected, hint=f"no --{name.replace('_', '-')}"
    )


def _of_processor(said: dict[str, Any], channels: int) -> tuple[list[float], list[float]]:
    """Return what an image processor of transformers normalises by, in units of 0..1."""
    if said.get("do_normalize", True) is False:
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean, std = _numbers(said.get("image_mean"), channels), _numbers(said.get("image_std"), channels)
    scale = 255 * (_number(said.get("rescale_factor"), 1 / 255) if said.get("do_rescale", True) is not False else 1.0)
    return ([v / scale for v in mean], [v / scale for v in std]) if scale > 0 else ([], [])


def _mapping(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _size(value: object) -> Size | None:
    if side := _count(value):
        return side, side
    if not isinstance(value, list) or len(value) not in (2, 3) or not all(_count(side) for side in value):
        return None
    return value[-2], value[-1]


def _number(value: object, default: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good and isinstance(value, int | float) else default


def _numbers(value: object, count: int) -> list[float]:
    """Return a list of that many finite numbers, or none of them."""
    if not isinstance(value, list) or len(value) != count:
        return []
    good = all(isinstance(one, int | float) and math.isfinite(one) for one in value)
    return [float(one) for one in value] if good else []
