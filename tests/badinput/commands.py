"""Family 3.3: config files, which hold data and nothing else, and command lines, judged as the lines of a file are."""

import os

from maekit import config, settings

from .case import Case
from .datasets import GOOD, PRETRAIN

SHOW = "config show --verb pretrain --config HERE/c.yaml"
FLAGS = "config show --verb pretrain"


STORED = config.dump_yaml(config.resolve(settings.Pretrain)[0])
"""The settings of a run, without what they resolved to."""


def cases() -> list[Case]:
    """Return every case."""
    return [*files(), *values(), *pairs(), *lines(), *runs(), *right()]


def files() -> list[Case]:
    """Config files that are none, or more than data."""
    yaml = {
        "nothing": ("", "nothing"),
        "a comment": ("# mine\n", "nothing"),
        "a list": ("- a\n- b\n", "a list"),
        "a word": ("hello", "a str"),
        "a number": ("3", "a str"),
        "two documents": ("a: 1\n---\nb: 2\n", ""),
        "tabs": ("mask_ratio:\t0.5\n\tseed: 3\n", "line 2|line 1"),
        "an open bracket": ("betas: [0.9, 0.95\n", "line"),
        "an open quote": ("data: 'photos\n", "line"),
        "a colon too many": ("data: a: b\n", "line 1"),
        "a key twice": ("seed: 1\nseed: 2\n", "'seed' stands twice in line 2"),
        "a key that is a list": ("[a, b]: 1\n", "key is not a word|line 1"),
        "an anchor": ("data: &a x\nout: *a\n", "anchor"),
        "an alias bomb": ("a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\n", "anchor"),
        "a merge": ("<<: {seed: 3}\n", "setting '<<'"),
        "a tag": ("seed: !!int 3\n", "a tag"),
        "a tag of ours": ("seed: !mine 3\n", "a tag"),
        "an object": ("seed: !!python/object/apply:os.mkdir [it-ran]\n", "a tag"),
        "a name": ("seed: !!python/name:os.system ''\n", "a tag"),
        "a module": ("seed: !!python/module:os ''\n", "a tag"),
        "a new object": ("!!python/object/new:os.mkdir [it-ran]\n", "a tag"),
        "a binary": ("seed: !!binary aGk=\n", "a tag"),
        "a depth of 10,000": ("a: " + "[" * 10_000, ""),
        "a depth of 9": ("a: " + "[" * 9 + "]" * 9, "more than 8 levels"),
        "a directive": ("%YAML 9.9\n---\nseed: 1\n", ""),
        "NUL": ("seed: \0\n", "special characters|line"),
        "a bell": ("seed: \x07\n", "special characters|line"),
        "UTF-16": ("seed: 1\n".encode("utf-16"), "UTF-8|special"),
        "latin-1": ("data: caf\xe9\n".encode("latin-1"), "UTF-8"),
        "a pickle": (b"\x80\x04cos\nmkdir\n", "UTF-8"),
        "JSON that is cut": ('{"seed": ', ""),
        "a program": (b"\x7fELF\xff\xfe", "UTF-8"),
    }
    keys = {
        "_target_": "_target_: os.system\n",
        "a class": "__class__: Pretrain\n",
        "an import": "import: os\n",
        "a path to a class": "class_path: torch.nn.Linear\n",
        "_partial_": "_partial_: yes\n",
        "extends": "extends: x.yaml\n",
        "trust_remote_code": "trust_remote_code: yes\n",
        "auto_map": "auto_map: {AutoModel: x.Y}\n",
        "a wrong case": "Mask_Ratio: 0.5\n",
        "a blank": "mask ratio: 0.5\n",
        "nothing": "? \n: 1\n",
        "terminal codes": '"\\x1b[31mred": 1\n',
        "a line feed": '"a\\nb": 1\n',
        "1000 letters": "x" * 1000 + ": 1\n",
    }
    code = {
        "interpolation": ("mask_ratio: ${oc.env:HOME}\n", "mask_ratio"),
        "an expression": ("mask_ratio: 1 - 0.25\n", "mask_ratio"),
        "an import": ("seed: __import__('os').mkdir('it-ran')\n", "seed"),
        "a template": ("lr: '{{ 7*7 }}'\n", "lr"),
        "a shell": ("workers: $(touch it-ran)\n", "workers"),
        "a class": ("precision: torch.float16\n", "precision"),
        "an object": ("seed: {_target_: os.mkdir, path: it-ran}\n", "seed"),
    }
    made = [
        *(
            Case(f"a config that is {what}", {"c.yaml": text}, SHOW, "E-CONFIG-", said, 2)
            for what, (text, said) in yaml.items()
        ),
        *(
            Case(
                f"a config with a key of {what}",
                {"c.yaml": text},
                SHOW,
                "E-CONFIG-",
                "unknown setting|not a word|is not",
                2,
            )
            for what, text in keys.items()
        ),
        *(
            Case(f"a value that is {what}", {"c.yaml": text}, SHOW, "E-CONFIG-VALUE", f"setting {said}", 2)
            for what, (text, said) in code.items()
        ),
        Case(
            "a model that is code",
            {**GOOD, "c.yaml": "model: os.system\n"},
            f"{PRETRAIN.replace('--model vit_tiny_patch16_224', '')} --config HERE/c.yaml",
            "E-CONFIG-MODEL",
            "os.system",
            2,
        ),
        Case("a config that is not there", {}, SHOW, "E-CONFIG-FILE", "no such file", 2),
        Case("a config that is a folder", {"c.yaml/": ""}, SHOW, "E-CONFIG-FILE", "no regular file", 2),
        Case(
            "a config that is a pipe",
            lambda here: os.mkfifo(here / "c.yaml"),
            SHOW,
            "E-CONFIG-FILE",
            "no regular file",
            2,
        ),
        Case(
            "a config that is a device",
            lambda here: (here / "c.yaml").symlink_to("/dev/zero"),
            SHOW,
            "E-CONFIG-FILE",
            "no regular file",
            2,
        ),
        Case("a config of 200 kB", {"c.yaml": "# x\n" * 50_000}, SHOW, "E-CONFIG-FILE", "at most", 2),
        Case(
            "a config of a newer format",
            {"c.yaml": "format: 99\nseed: 1\n"},
            SHOW,
            "E-CONFIG-FORMAT",
            "newer maekit",
            2,
        ),
        Case("a config of no format", {"c.yaml": "format: x\nseed: 1\n"}, SHOW, "E-CONFIG-FORMAT", "format x", 2),
        Case("a config of another verb", {"c.yaml": "verb: knn\nk: 3\n"}, SHOW, "E-CONFIG-VERB", "settings of knn", 2),
        Case("a config of no verb", {"c.yaml": "verb: [a]\n"}, SHOW, "E-CONFIG-VERB", "", 2),
        Case(
            "a config of an unknown recipe",
            {"c.yaml": "recipe: pretrain-vit-z\n"},
            SHOW,
            "E-CONFIG-RECIPE",
            "did you mean",
            2,
        ),
        Case("a recipe that is a path", {"c.yaml": "recipe: ../../etc/passwd\n"}, SHOW, "E-CONFIG-RECIPE", "", 2),
        Case(
            "five faults at once",
            {"c.yaml": "mask_ration: 1\nseed: x\nbatch_size: 0\nepochs: 1\nsteps: 1\nbetas: 3\n"},
            SHOW,
            "E-CONFIG-SETTINGS",
            r"5 faults: .*mask_ratio.*seed|5 faults",
            2,
        ),
    ]
    return made


def values() -> list[Case]:
    """One setting out of its range or of another kind, as a flag; test_config says that a file's are the same."""
    wrong = {
        "mask-ratio": ("0", "1", "1.5", "-0.1", "nan", "75%", "x"),
        "lr": ("0", "-1", "inf", "1e999", "1,5"),
        "epochs": ("0", "-5", "nan"),
        "steps": ("0", "1.5", "1e3x", "-1"),
        "batch-size": ("0", "-8", "8.5", "1_0_"),
        "workers": ("-1", "1000000", "two"),
        "seed": ("-1", str(2**64), "0.5", "0x10"),
        "channels": ("0", "5000"),
        "img-size": ("0x0", "a", "1.5"),
        "betas": ("0.9", "2"),
        "weight-decay": ("-1",),
        "min-lr": ("-1",),
        "ema": ("1", "0"),
        "clip-grad": ("0", "-1"),
        "warmup-epochs": ("-1",),
        "keep": ("0",),
        "save-every": ("0",),
        "log-every": ("0",),
        "precision": ("fp8", "FP16x"),
        "crop": ("middle",),
        "mask-kind": ("squares",),
        "target": ("pixels",),
        "nproc": ("0", "x"),
        "embed-dim": ("3", "x"),
        "depth": ("0",),
        "num-heads": ("0",),
        "decoder-depth": ("-1",),
        "drop-path": ("1", "-0.1"),
        "color-jitter": ("2",),
        "add-noise": ("-1", "inf"),
        "mask-unit": ("0",),
        "class-tokens": ("-1", "9999"),
        "decode-ratio": ("0", "1.1"),
        "patch-size": ("0", "x"),
        "stats": ("coco",),
        "micro-batch": ("0", "some"),
    }
    return [
        Case(f"--{flag} {value}", {}, f"{FLAGS} --{flag} {value}", "E-", flag.replace("-", ".").replace("1", "."), 2)
        for flag, many in wrong.items()
        for value in many
    ]


def pairs() -> list[Case]:
    """Settings that do not go together, found before any work."""
    base = PRETRAIN
    rows = {
        "a size that patches do not fill": (f"{base} --img-size 9", "E-CONFIG-SIZE", "9"),
        "heads that do not divide the width": (f"{base} --num-heads 3", "E-CONFIG-", "3"),
        "decoder heads that do not divide its width": (f"{base} --decoder-heads 3", "E-CONFIG-", "3"),
        "a ratio that leaves nothing": (f"{base} --mask-ratio 0.999", "E-CONFIG-MASK", "0.999"),
        "epochs and steps": (f"{base} --epochs 3", "E-CONFIG-BOTH", "epochs and steps"),
        "two learning rates": (f"{base} --lr 1 --base-lr 1", "E-CONFIG-BOTH", "base_lr and lr"),
        "a warm-up longer than the run": (f"{base} --warmup-steps 3", "E-CONFIG-LENGTH", "warm-up"),
        "a smallest rate above the largest": (f"{base} --lr 1e-3 --min-lr 1", "E-CONFIG-LR", "min_lr"),
        "a model that is none": (f"{base} --model resnet50", "E-CONFIG-MODEL", "resnet50"),
        "a model with a stem": (f"{base} --model vit_base_r50_s16_224", "E-CONFIG-MODEL", "r50"),
        "a model from the hub": (f"{base} --model hf-hub:timm/x", "E-CONFIG-MODEL", "hf-hub"),
        "a model that is a path": (f"{base} --model HERE/set", "E-CONFIG-MODEL", "set"),
        "a ratio range the wrong way": (f"{base} --mask-ratio 0.6 --mask-ratio-max 0.5", "E-CONFIG-", "mask_ratio_max"),
        "a target without its file": (f"{base} --target pca", "E-CONFIG-", "target"),
        "a file without its target": (f"{base} --target-from HERE/set", "E-CONFIG-", "target"),
        "a crop range the wrong way": (f"{base} --crop-scale 0.9 0.1", "E-CONFIG-VALUE", "smaller value first"),
        "a resume of nothing": (f"{base} --resume", "E-CONFIG-OUT", "no run"),
        "a device that is a word": (f"{base} --device gpu", "E-CONFIG-DEVICE", "gpu"),
        "an out that is a file": (base.replace("HERE/new", "HERE/set/a.png"), "E-CONFIG-OUT", "found a file"),
        "an out with other files": (base.replace("HERE/new", "HERE"), "E-CONFIG-OUT", "no run's"),
        "a learned position without place": (f"{base} --positions cosine", "E-CONFIG-VALUE", "positions"),
    }
    made = [Case(name, GOOD, words, code, said, 2) for name, (words, code, said) in rows.items()]
    return [
        *made,
        Case("a device that is not there", GOOD, f"{base} --device cuda:99", "E-ENV-DEVICE", "cuda:99", 5),
        Case("half precision on a CPU", GOOD, f"{base} --precision fp16", "E-ENV-PRECISION", "fp16", 5),
        Case("an out below a file", {**GOOD, "f": "x"}, base.replace("HERE/new", "HERE/f/x"), "E-ENV-OUT", "f/x", 5),
    ]


def lines() -> list[Case]:
    """Command lines."""
    rows = {
        "an unknown verb": ("pretrian", "did you mean 'pretrain'"),
        "a verb that is a path": ("../x", "unknown verb"),
        "a verb of terminal codes": ("\x1b[31m", r"\\x1b"),
        "a verb of 5000 letters": ("x" * 5000, "unknown verb"),
        "a module for a verb": ("os.system", "unknown verb"),
        "an empty verb": ("\xa0", "unknown verb"),
        "an unknown flag": (f"{FLAGS} --mask-ration 0.5", "did you mean '--mask-ratio'"),
        "a flag with a long dash": (f"{FLAGS} \u2014mask-ratio 0.5", "did you mean '--mask-ratio'"),
        "a flag with a minus sign": (f"{FLAGS} \u2212\u2212seed 5", "did you mean '--seed'"),
        "a flag with one dash": (f"{FLAGS} -seed 5", "did you mean '--seed'"),
        "a flag that is cut short": (f"{FLAGS} --mask-rat 0.5", "did you mean '--mask-ratio'"),
        "a flag without a value": (f"{FLAGS} --seed", "expected"),
        "a flag with nothing": (f"{FLAGS} --seed=", "seed"),
        "a pair with one value": (f"{FLAGS} --betas 0.9", "betas"),
        "a word too many": (f"{FLAGS} photos more", "unexpected word"),
        "a switch with a value": (f"{FLAGS} --flip=maybe", "flip"),
        "a negative switch of no switch": (f"{FLAGS} --no-seed", "no.seed"),
        "two dashes alone": (f"{FLAGS} -- --seed 5", "unexpected word '--seed'"),
        "a flag that sets a field": (f"{FLAGS} --__class__ x", "unknown flag"),
        "a dotted flag": (f"{FLAGS} --model.name x", "unknown flag"),
        "an addition of Hydra": (f"{FLAGS} +model=x", "unexpected word"),
        "a value of Hydra": (f"{FLAGS} model=os.system", "unexpected word"),
        "a verb without settings": ("config show --verb recipes", "without settings"),
        "a verb missing": ("config show --verb", "unknown verb"),
        "no run": ("config show", "RUN or --verb"),
        "a run and a flag": ("config show runs/a --seed 5", "unexpected word"),
        "config of nothing": ("config shwo", "did you mean 'show'"),
        "a diff of one": ("config diff builtin/pretrain-fashion", "twice"),
        "a diff of three": ("config diff a b c", "unexpected word"),
        "a recipe too many": ("recipes a b", "unexpected word"),
        "a recipe shown without a name": ("recipes show", "a name first"),
        "data with a flag of another verb": ("data HERE --mask-ratio 0.5", "unknown flag"),
    }
    made = [Case(name, {}, words, "E-", said, 2) for name, (words, said) in rows.items()]
    return [
        *made,
        Case("an unknown recipe", {}, "recipes nothing-like-it", "E-CONFIG-RECIPE", "", 2),
        Case(
            "a recipe for another verb",
            {},
            f"{FLAGS} --recipe builtin/finetune-fashion",
            "E-CONFIG-RECIPE",
            "a recipe for finetune",
            2,
        ),
        Case(
            "a diff of two verbs",
            {},
            "config diff builtin/pretrain-fashion builtin/finetune-fashion",
            "E-CONFIG-VERB",
            "two of the same verb",
            2,
        ),
        Case(
            "a diff of nothing", {}, "config diff HERE/a HERE/b", "E-CONFIG-RECIPE", "no run, config file or recipe", 2
        ),
        Case(
            "data with five channels and a half", GOOD, "data HERE/set --channels 5.5", "E-CONFIG-VALUE", "channels", 2
        ),
    ]


def runs() -> list[Case]:
    """Folders that are no run, where one is wanted."""
    return [
        Case(
            "the config of a folder without one",
            {"run/": ""},
            "config show HERE/run",
            "E-CONFIG-FILE",
            "no such file",
            2,
        ),
        Case("the config of a picture", GOOD, "config show HERE/set/a.png", "E-CONFIG-", "UTF-8", 2),
        Case("a comparison with nothing", {"run/": ""}, "compare HERE/run HERE/run", "E-", "run", 2),
        Case(
            "a run of a newer maekit",
            {**GOOD, "new/config.yaml": "format: 99\nverb: pretrain\n"},
            PRETRAIN,
            "E-CONFIG-FORMAT",
            "newer",
            2,
        ),
        Case(
            "a run whose settings are rubbish",
            {**GOOD, "new/config.yaml": "hello"},
            PRETRAIN,
            "E-CONFIG-YAML",
            "a str",
            2,
        ),
        Case(
            "a run whose settings are code",
            {**GOOD, "new/config.yaml": "seed: !!python/object/apply:os.mkdir [it-ran]\n"},
            PRETRAIN,
            "E-CONFIG-YAML",
            "a tag",
            2,
        ),
        Case(
            "a run of another verb",
            {**GOOD, "new/config.yaml": "format: 1\nverb: knn\n"},
            PRETRAIN,
            "E-CONFIG-",
            "knn",
            2,
        ),
        *(
            Case(
                f"a run that resolved to {what}",
                {**GOOD, "new/config.yaml": f"{STORED}resolved: {text}\n"},
                "pretrain --config HERE/new/config.yaml --data HERE/set --out HERE/new --device cpu",
                "E-CONFIG-RUN",
                "resolved",
                2,
            )
            for what, text in {
                "a word": "x",
                "nothing": "",
                "a list": "[1, 2]",
                "words for images": "{images: many, fingerprint: x}",
                "less": "{images: 3}",
                "a model that is a list": "{images: 2, fingerprint: x, model: [1]}",
            }.items()
        ),
        *(
            Case(
                f"a comparison of results that are {what}",
                {
                    "run/config.yaml": "format: 1\nverb: probe\nresolved: {images: 1, fingerprint: x}\n",
                    "run/result.json": text,
                },
                "compare HERE/run HERE/run",
                "E-CONFIG-RUN",
                "no JSON",
                2,
            )
            for what, text in {
                "a number": "3",
                "a word": '"x"',
                "brackets": "[" * 100_000,
                "nothing": "",
                "cut": '{"a":',
            }.items()
        ),
    ]


def right() -> list[Case]:
    """Odd spellings that are right: nothing is guessed, and text means in a file what it means as a flag."""

    def shows(text: str, said: str) -> Case:
        return Case(f"a config that says {text!r}", {"c.yaml": text}, SHOW, "", said)

    return [
        shows("base_lr: 1e-4\n", r"base_lr: 0.0001\b"),
        shows("seed: 010\n", r"seed: 10\b"),
        shows("flip: no\n", r"flip: false"),
        shows("flip: off\n", "flip: false"),
        shows("\ufeffseed: 3\r\n", r"seed: 3\b"),
        shows("clip_grad: none\n", "clip_grad: null"),
        shows("clip_grad: ~\n", "clip_grad: null"),
        shows('{"seed": 7}', r"seed: 7\b"),
        shows("data: no\n", "data: .?no"),
        shows("data: 'a: b'\n", "data: 'a: b'"),
        shows("img_size: [32, 64]\n", r"img_size: \[32, 64\]"),
        shows("data: 1:30\n", "1:30"),
        Case("underscores in a flag", {}, f"{FLAGS} --mask_ratio 0.5", "", r"mask_ratio: 0.5\b"),
        Case("an equals sign", {}, f"{FLAGS} --mask-ratio=0.5", "", r"mask_ratio: 0.5\b"),
        Case("a path with an equals sign", {}, f"{FLAGS} --data=a=b", "", "data: a=b"),
        Case("a negative number", {}, f"{FLAGS} --min-lr -0", "", "min_lr: -?0"),
        Case("help", {}, "--help", "", "verbs:"),
        Case("no word", {}, "", "", "verbs:"),
        Case("the version", {}, "--version", "", "maekit"),
        Case("help of a verb", {}, "data --help", "", "usage: maekit data"),
    ]
