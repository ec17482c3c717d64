"""What users get wrong: one line that says what and where, the right exit code, and nothing left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maekit.cli import main

Run = Callable[..., Any]

TINY = (
    "--model vit_tiny_patch16_224 --img-size 28 --patch-size 7 --channels 1 --embed-dim 16 --depth 1 --num-heads 2 "
    "--decoder-dim 16 --decoder-depth 1 --decoder-heads 2 --device cpu --workers 0 --batch-size 8"
)
PRETRAIN = f"pretrain --data FLAT --out NEW {TINY} --steps 2"
FINETUNE = "finetune RUN --data CLASSES --out NEW --device cpu --workers 0 --epochs 1 --batch-size 8"

ROWS = [
    # data
    ("pretrain --data missing --out NEW", 3, "E-DATA-PATH", "missing"),
    ("pretrain --data EMPTY --out NEW", 3, "E-DATA-EMPTY", "no images"),
    ("pretrain --data https://example.org/images --out NEW", 3, "E-DATA-PATH", "nothing is fetched"),
    ("pretrain --data s3://bucket/images --out NEW", 3, "E-DATA-PATH", "nothing is fetched"),
    ("pretrain --data builtin:mnist --out NEW", 3, "E-DATA-PATH", "builtin:fashion"),
    ("pretrain --out NEW", 2, "E-USAGE-DATA", "--data"),
    ("pretrain --data TEXT --out NEW", 3, "E-DATA-", "photo.txt"),
    ("finetune RUN --data DIFFER --out NEW --device cpu", 3, "E-DATA-CLASSES", "found 'cat', expected"),
    ("knn RUN --data DIFFER --device cpu", 3, "E-DATA-CLASSES", "found 'cat', expected"),
    ("finetune RUN --data ONE --out NEW --device cpu", 3, "E-DATA-CLASSES", "one class"),
    ("probe RUN --data ONE --device cpu", 3, "E-DATA-CLASSES", "one class"),
    ("finetune RUN --data FLAT --out NEW --device cpu", 3, "E-DATA-LABELS", "no labels"),
    ("probe RUN --data FLAT --device cpu", 3, "E-DATA-LABELS", "no labels"),
    ("knn RUN --data FLAT --device cpu", 3, "E-DATA-LABELS", "no labels"),
    (f"{FINETUNE} --labels 1000/class", 3, "E-DATA-LABELS", "1000"),
    (f"{FINETUNE} --labels ten", 2, "E-USAGE-LABELS", "10/class"),
    (f"{FINETUNE} --labels 1/class --select held-out", 3, "E-DATA-LABELS", "none that can be held out"),
    ("partial RUN --data ONE --out NEW --device cpu", 3, "E-DATA-CLASSES", "one class"),
    ("partial RUN --data FLAT --out NEW --device cpu", 3, "E-DATA-LABELS", "no labels"),
    # settings
    (f"{FINETUNE} --tune-blocks 9", 2, "E-CONFIG-BLOCKS", "9 of a model of 4 blocks"),
    (f"{FINETUNE} --tune-blocks half", 2, "E-CONFIG-VALUE", "tune_blocks"),
    (f"{FINETUNE} --select best", 2, "E-CONFIG-VALUE", "'last' or 'held-out'"),
    (f"{FINETUNE} --tta 10-crop", 2, "E-CONFIG-TTA", "crop_pct below 1"),
    (f"{FINETUNE} --mixup 0 --cutmix 0 --mixup-prob 0.5", 2, "E-CONFIG-IDLE", "mixup and cutmix 0"),
    (f"{FINETUNE} --auto-augment tensor-m11-n2", 2, "E-CONFIG-AUGMENT", "tensor-m9-n2"),
    ("partial RUN --data CLASSES --tune-blocks 0 9 --out NEW --device cpu", 2, "E-CONFIG-BLOCKS", "9 of a model"),
    ("partial --data CLASSES --out NEW --device cpu", 2, "E-USAGE-RUN", "nothing to start from"),
    (f"{PRETRAIN} --mask-ration 0.5", 2, "E-USAGE-FLAG", "did you mean '--mask-ratio'?"),
    (f"{PRETRAIN} --config CONFIG", 2, "E-CONFIG-KEY", "did you mean 'mask_ratio'?"),
    (f"{PRETRAIN} --img-size 30", 2, "E-CONFIG-SIZE", "30"),
    (f"{PRETRAIN} --mask-ratio 0.00000001", 2, "E-CONFIG-MASK", "1e-08"),
    (f"{PRETRAIN} --mask-ratio 0.9999", 2, "E-CONFIG-MASK", "0.9999"),
    (f"{PRETRAIN} --mask-ratio 75", 2, "E-CONFIG-VALUE", "less than 1"),
    (f"{PRETRAIN} --batch-size 8 --micro-batch 3", 2, "E-CONFIG-BATCH", "--micro-batch auto"),
    (f"{PRETRAIN} --checkpointing-encoder 2", 2, "E-CONFIG-IDLE", "without checkpointing"),
    (f"{PRETRAIN} --checkpointing --checkpointing-encoder 0 --checkpointing-decoder 0", 2, "E-CONFIG-IDLE", "0 blocks"),
    ("bench memory --checkpointing-encoder 0 --checkpointing-decoder 0 --device cpu", 2, "E-CONFIG-IDLE", "0 blocks"),
    (f"{PRETRAIN} --roll-back 2", 2, "E-CONFIG-IDLE", "without spike_sigma"),
    (f"{PRETRAIN} --micro-batch 0", 2, "E-CONFIG-VALUE", "micro_batch"),
    (f"{PRETRAIN} --workers -1", 2, "E-CONFIG-VALUE", "workers"),
    (f"{PRETRAIN} --lr nan", 2, "E-CONFIG-VALUE", "lr"),
    (f"{PRETRAIN} --lr inf", 2, "E-CONFIG-VALUE", "lr"),
    (f"{PRETRAIN} --epochs 3", 2, "E-CONFIG-BOTH", "epochs and steps"),
    (f"{PRETRAIN} --warmup-steps 3", 2, "E-CONFIG-LENGTH", "warm-up longer"),
    (f"{PRETRAIN} --lr 1e-3 --min-lr 1e-2", 2, "E-CONFIG-LR", "min_lr"),
    (f"{PRETRAIN} --model resnet50", 2, "E-CONFIG-MODEL", "resnet50"),
    (f"{PRETRAIN} --embed-dim 17", 2, "E-CONFIG-", "17"),
    (f"{PRETRAIN} --recipe paper/pretrain-vit-z", 2, "E-CONFIG-RECIPE", "did you mean"),
    (f"{PRETRAIN} --recipe builtin/finetune-fashion", 2, "E-CONFIG-RECIPE", "a recipe for finetune"),
    (f"{PRETRAIN} --crop-scale 0.9 0.1", 2, "E-CONFIG-VALUE", "the smaller value first"),
    (f"{PRETRAIN} --crop-scale -1 5", 2, "E-CONFIG-VALUE", "crop_scale"),
    (f"{PRETRAIN} --betas 2 0.9", 2, "E-CONFIG-VALUE", "betas"),
    (f"{PRETRAIN} --warmup-epochs 50", 2, "E-CONFIG-LENGTH", "warm-up longer"),
    (f"{PRETRAIN} --resume", 2, "E-CONFIG-OUT", "no run"),
    (f"{PRETRAIN} --label-column kind", 3, "E-DATA-COLUMN", "label_column"),
    (f"{PRETRAIN.replace('--channels 1', '--channels 2')}", 2, "E-CONFIG-CHANNELS", "--channels 3"),
    ("knn RUN --data CLASSES --raw-pixels --random-init", 2, "E-CONFIG-BOTH", "raw_pixels and random_init"),
    ("probe RUN --data CLASSES --base-lr 5 --epochs 3", 2, "E-CONFIG-BOTH", "--protocol lars"),
    ("probe RUN --data CLASSES --no-flip --micro-batch 8", 2, "E-CONFIG-BOTH", "micro_batch and flip"),
    ("lowshot RUN --data CLASSES --shots 5,25 --device cpu", 3, "E-DATA-LABELS", "24 images, expected 25"),
    ("lowshot RUN --data FLAT --device cpu", 3, "E-DATA-LABELS", "no labels"),
    ("lowshot RUN --data ONE --device cpu", 3, "E-DATA-CLASSES", "one class"),
    ("lowshot RUN --data CLASSES --draws 0", 2, "E-CONFIG-VALUE", "draws"),
    ("retrieve RUN --device cpu", 2, "E-USAGE-DATA", "no images named"),
    ("retrieve --data FLAT --device cpu --out NEW", 2, "E-USAGE-RUN", "no weights named"),
    ("retrieve RUN --data FLAT --out FLAT/pictures --device cpu", 2, "E-CONFIG-OUT", "a place in --data"),
    ("probe RUN --data CLASSES --protocol lars --layers all --out NEW", 2, "E-CONFIG-BOTH", "layers"),
    ("probe RUN --data CLASSES --protocol lars --pool mean,cls --out NEW", 2, "E-CONFIG-BOTH", "pool"),
    ("probe RUN --data CLASSES --protocol lars --labels 1%,10% --out NEW", 2, "E-CONFIG-BOTH", "labels"),
    ("probe RUN --data CLASSES --protocol attentive --pool cls --out NEW", 2, "E-CONFIG-BOTH", "pool"),
    ("probe RUN --data CLASSES --layers 1,9 --device cpu", 2, "E-CONFIG-LAYERS", "1 to 4"),
    ("probe RUN --data CLASSES --layers some", 2, "E-CONFIG-VALUE", "layers"),
    ("probe RUN --data CLASSES --pool mean,max", 2, "E-CONFIG-VALUE", "pool"),
    ("probe RUN --data CLASSES --labels 1%,ten --device cpu", 2, "E-USAGE-LABELS", "ten"),
    ("knn RUN --data CLASSES --cache TEXT --device cpu", 2, "E-CONFIG-OUT", "a file"),
    ("knn RUN --data CLASSES --k 1,x", 2, "E-CONFIG-VALUE", "k"),
    ("knn RUN --data CLASSES --temperature 0", 2, "E-CONFIG-VALUE", "temperature"),
    (
        "probe RUN --data CLASSES --protocol lars --epochs 3 --warmup-epochs 4 --out NEW",
        2,
        "E-CONFIG-LENGTH",
        "warm-up longer",
    ),
    (f"{FINETUNE} --model vit_base_patch16_224", 2, "E-CONFIG-RUN", "vit_tiny_patch16_224"),
    ("config show --verb recipes", 2, "E-USAGE-VERB", "without settings"),
    (f"{PRETRAIN} --config FLAT", 2, "E-CONFIG-FILE", "no regular file"),
    (f"{PRETRAIN} --stats imagenet", 2, "E-CONFIG-STATS", "imagenet"),
    (f"{PRETRAIN} --nproc 0", 2, "E-CONFIG-VALUE", "nproc"),
    ("pretrian --data FLAT", 2, "E-USAGE-VERB", "did you mean 'pretrain'?"),
    (f"{FINETUNE} --auto-augment rand-m9-zz1", 2, "E-CONFIG-AUGMENT", "rand-m9-zz1"),
    (f"{FINETUNE} --embed-dim 32", 2, "E-CONFIG-RUN", "embed_dim"),
    (f"{FINETUNE} --warmup-epochs 2", 2, "E-CONFIG-LENGTH", "warm-up longer"),
    ("finetune --data CLASSES --out NEW --device cpu", 2, "E-USAGE-RUN", "--from-scratch"),
    ("finetune --eval-only --data CLASSES --out NEW --device cpu", 2, "E-USAGE-RUN", "no classifier named"),
    ("finetune RUN --eval-only --data CLASSES --out NEW --device cpu", 4, "E-CKPT-KIND", "pre-trained"),
    ("partial RUN --eval-only --data CLASSES --out NEW --device cpu", 2, "E-CONFIG-IDLE", "eval_only"),
    # machine
    (f"{PRETRAIN} --device cuda:99", 5, "E-ENV-DEVICE", "cuda:99"),
    (f"{PRETRAIN} --device gpu", 2, "E-CONFIG-DEVICE", "gpu"),
    (f"{PRETRAIN} --precision fp16", 5, "E-ENV-PRECISION", "fp16 on cpu"),
    # output
    (f"pretrain --data FLAT --out TEXT {TINY} --steps 2", 2, "E-CONFIG-OUT", "found a file"),
    (f"pretrain --data FLAT --out TEXT/run {TINY} --steps 2", 5, "E-ENV-OUT", "writable"),
    (f"pretrain --data FLAT --out CLASSES {TINY} --steps 2", 2, "E-CONFIG-OUT", "no run's"),
    (f"pretrain --data FLAT --out FLAT {TINY} --steps 2", 2, "E-CONFIG-OUT", "a place in --data"),
    (f"pretrain --data FLAT --out FLAT/run {TINY} --steps 2", 2, "E-CONFIG-OUT", "a place in --data"),
    ("reconstruct RUN --data FLAT --out FLAT/pictures --device cpu", 2, "E-CONFIG-OUT", "a place in --data"),
    ("embed RUN --data FLAT --out FLAT/features.npy --device cpu", 2, "E-CONFIG-OUT", "a place in --data"),
    ("probe RUN --data CLASSES --out RUN --device cpu", 2, "E-CONFIG-RUN", "a run of pretrain"),
    ("quickstart --data FLAT --out RUN --device cpu", 2, "E-CONFIG-RUN", "a run of pretrain"),
    ("quickstart --data FLAT --out CLASSES --device cpu", 2, "E-CONFIG-OUT", "no run's"),
    ("finetune RUN --data CLASSES --out RUN --device cpu", 2, "E-CONFIG-RUN", "a run of pretrain"),
    ("embed RUN --data FLAT --out NEW.csv --device cpu", 2, "E-USAGE-OUT", "FILE.parquet"),
    ("embed RUN --data FLAT --device cpu", 2, "E-USAGE-OUT", "FILE.parquet"),
    ("embed RUN --data FLAT --pool tokens --out NEW.parquet --device cpu", 2, "E-USAGE-OUT", ".npy"),
    ("predict RUN --data FLAT --device cpu", 2, "E-USAGE-OUT", "FILE.parquet or FILE.csv"),
    ("predict RUN --data FLAT --out NEW.xlsx --device cpu", 2, "E-USAGE-OUT", "FILE.parquet or FILE.csv"),
    ("predict RUN --data FLAT --out NEW.csv --grid NEW.jpg --device cpu", 2, "E-USAGE-OUT", "FILE.png"),
    ("predict RUN --data FLAT --out FLAT/p.csv --device cpu", 2, "E-CONFIG-OUT", "a place in --data"),
    ("predict RUN --data FLAT --out NEW.csv --count 9 --device cpu", 2, "E-CONFIG-IDLE", "no grid"),
    ("predict RUN --out NEW.csv --device cpu", 2, "E-USAGE-DATA", "no images named"),
    ("predict --data FLAT --out NEW.csv --device cpu", 2, "E-USAGE-RUN", "no classifier named"),
    ("predict RUN --data FLAT --out NEW.csv --device cpu", 4, "E-CKPT-KIND", "maekit finetune"),
    # weights
    ("knn TEXT --data CLASSES --device cpu", 4, "E-CKPT-FORMAT", "photo.txt"),
    ("knn NOWEIGHTS --data CLASSES --device cpu", 4, "E-CKPT-MISSING", "noweights"),
    ("knn missing --data CLASSES --device cpu", 4, "E-CKPT-MISSING", "missing"),
    ("knn --data CLASSES --device cpu", 2, "E-USAGE-RUN", "no weights named"),
    (f"{PRETRAIN} --init RUN", 4, "E-CKPT-MODEL", "--num-heads 4"),
    (f"{PRETRAIN} --init RUN --num-heads 4 --decoder-heads 4 --target pixel", 4, "E-CKPT-MODEL", "maekit config show"),
    (
        "pretrain --recipe builtin/pretrain-fashion --init RUN --num-heads 8 --out NEW --device cpu --data FLAT "
        "--batch-size 8",
        4,
        "E-CKPT-MODEL",
        "--num-heads 4",
    ),
    (f"{PRETRAIN} --init TEXT", 4, "E-CKPT-FORMAT", "photo.txt"),
    ("knn RUN --data CLASSES --k 0", 2, "E-CONFIG-VALUE", "k"),
    # pictures
    ("reconstruct RUN --out NEW --device cpu", 2, "E-USAGE-IMAGES", "no images named"),
    ("reconstruct RUN TEXT --out NEW --device cpu", 3, "E-DATA-IMAGE", "photo.txt"),
    ("reconstruct RUN missing.png --out NEW --device cpu", 3, "E-DATA-PATH", "missing.png"),
    ("reconstruct RUN FLAT --out NEW --device cpu", 3, "E-DATA-PATH", "--data"),
    ("reconstruct RUN PICTURE --ratios 0 --out NEW --device cpu", 2, "E-CONFIG-", "0"),
    ("reconstruct RUN PICTURE --ratios 99.9 --out NEW --device cpu", 2, "E-CONFIG-MASK", "99.9"),
    # quickstart
    ("quickstart --data missing --out NEW", 3, "E-DATA-PATH", "missing"),
    ("quickstart --data EMPTY --out NEW", 3, "E-DATA-EMPTY", "no images"),
    ("quickstart --minutes 0 --out NEW", 2, "E-CONFIG-VALUE", "minutes"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, pretrained: Path, classes: Path, flat: Path) -> dict[str, Path]:
    """The words in capitals."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    (root / "photo.txt").write_text("This is no picture.\n" * 9)
    (root / "config.yaml").write_text("mask_ration: 0.5\n")
    (root / "noweights").mkdir()
    (root / "noweights/config.yaml").write_text("format: 1\nverb: pretrain\n")
    picture = next(flat.iterdir())
    for name in ("differ/train/cats", "differ/train/dogs", "differ/val/cat", "differ/val/dogs", "one/only"):
        (root / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.random.default_rng(i).integers(0, 256, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return {
        "RUN": pretrained, "CLASSES": classes, "FLAT": flat, "PICTURE": picture, "EMPTY": root / "empty",
        "TEXT": root / "photo.txt", "CONFIG": root / "config.yaml", "NOWEIGHTS": root / "noweights",
        "DIFFER": root / "differ", "ONE": root / "one",
    }  # fmt: skip


def spelled(command: str, places: dict[str, Path], new: Path) -> list[str]:
    words = []
    for word in command.split():
        name, dot, suffix = word.partition(".") if word.startswith("NEW") else word.partition("/")
        place = new if name == "NEW" else places.get(name)
        words.append(word if place is None else f"{place}{dot}{suffix}")
    return words


def listing(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("command", "exit_code", "code", "said"), ROWS, ids=[row[0].replace(TINY, "...") for row in ROWS]
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    command: str, exit_code: int, code: str, said: str, places: dict[str, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = listing(places["RUN"]) | listing(places["FLAT"]) | listing(places["TEXT"].parent)
    found = main(spelled(command, places, tmp_path / "new"))
    out, err = capfd.readouterr()
    errors = [line for line in err.splitlines() if "error[" in line]
    assert len(errors) == 1 and errors[0].startswith(f"maekit: error[{code}") and said in errors[0], err
    assert found == exit_code and out == "" and "Traceback" not in err and "Warning" not in err
    assert list(tmp_path.iterdir()) == [], "something was left behind"
    assert listing(places["RUN"]) | listing(places["FLAT"]) | listing(places["TEXT"].parent) == before


def test_no_gpu_is_said_with_exit_code_5(places: dict[str, Path], maekit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = maekit(*spelled(f"{PRETRAIN} --device cuda", places, Path("new")))
    assert done.code == 5 and done.stderr.startswith("maekit: error[E-ENV-DEVICE]") and done.stderr.count("\n") == 1


def test_after_a_mistake_the_mended_command_runs(places: dict[str, Path], tmp_path: Path, maekit: Run) -> None:
    """A refused setting must not be stored as that of a run."""
    wrong = spelled(f"{PRETRAIN} --warmup-steps 3", places, tmp_path / "new")
    assert maekit(*wrong).code == 2
    done = maekit(*wrong, "--warmup-steps", "1", "--json")
    assert done.code == 0 and done.json["steps"] == 2


def test_an_error_as_json(places: dict[str, Path], tmp_path: Path, maekit: Run) -> None:
    done = maekit(*spelled(f"{PRETRAIN} --mask-ratio 0.9999 --json", places, tmp_path / "new"))
    assert done.code == 2 and done.json["error"] == "E-CONFIG-MASK" and done.json["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", range(0, len(ROWS), 12))
def test_the_installed_command_says_the_same(number: int, places: dict[str, Path], tmp_path: Path, fresh: Run) -> None:
    command, exit_code, code, said = ROWS[number]
    done = fresh(*spelled(command, places, tmp_path / "new"))
    assert done.returncode == exit_code and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"maekit: error[{code}") and said in done.stderr


def test_a_run_of_another_verb_is_refused_by_quickstart(places: dict[str, Path], maekit: Run) -> None:
    before = listing(places["RUN"])
    done = maekit("quickstart", "--data", places["CLASSES"], "--out", places["RUN"], "--minutes", "0.01")
    assert done.code == 2 and done.stderr.startswith("maekit: error[E-CONFIG-"), done.stderr
    assert listing(places["RUN"]) == before
