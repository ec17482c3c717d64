import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image

from maekit.config import dump_yaml
from maekit.model.mae import create_model
from maekit.report.pretraining import pretrain_report
from maekit.settings import Pretrain


def run_folder(path: Path, target: Literal["norm_pixel", "pixel"], *, records: int = 60) -> Path:
    path.mkdir()
    settings = Pretrain(
        data="my photos/<b>", img_size=(16, 16), patch_size=4, target=target, mask_ratio=0.6, steps=600, epochs=None
    )
    resolved = {"images": 1234, "precision": "fp32", "mean": [0.5], "std": [0.2]}
    (path / "config.yaml").write_text(dump_yaml(settings, resolved), encoding="utf-8")
    lines = [
        {"step": 10 * i, "epoch": i / 8, "loss": 1 / i, "lr": 1e-3, "images_per_second": 900.0, "time": 2.0 * i}
        for i in range(1, records + 1)
    ]
    if records:
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 61')
    return path


@pytest.mark.parametrize("target", ["norm_pixel", "pixel"])
@pytest.mark.parametrize("records", [0, 60])
def test_a_run_explains_itself_in_one_page_and_some_pictures(
    tmp_path: Path, target: Literal["norm_pixel", "pixel"], records: int
) -> None:
    run = run_folder(tmp_path / "my run", target, records=records)
    model = create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2,
        decoder_dim=16, decoder_depth=1, decoder_heads=2, target=target,
    )  # fmt: skip
    report = pretrain_report(run, model, torch.rand(4, 1, 16, 16), seed=1)
    html = report.read_text(encoding="utf-8")
    assert report == run / "report.html" and "1,234 images" in html and "16 x 16 px, 1 channel;" in html
    assert "my photos/&lt;b&gt;" in html and "<b>" not in html
    assert "maekit knn" in html and "&#39;my photos/&lt;b&gt;&#39;" in html, "commands are ready for a shell"
    assert ("2 min 00 s" in html and html.count("<svg") == 1) if records else "No step was recorded" in html
    # 16 patches: 95 % would keep none
    names = ["reconstruction-60.png", "reconstruction-75.png", "reconstruction-85.png", "reconstructions.png"]
    assert sorted(file.name for file in (run / "reconstructions").iterdir()) == names
    for name in names:
        with Image.open(run / "reconstructions" / name) as image:
            image.verify()
    assert html.count("<img") == (2 if target == "norm_pixel" else 1)
