"""The file of predictions: one row per image that could be read, the same from ``predict`` and from ``finetune``.

Columns of FILE.parquet, in the order of the images:

=================  =======================  =============================================================
id                 int64                    place of the image among those asked for, from 0
path               string                   its name: relative path, or file.parquet:row
label              int64                    true class, as its output of the classifier; null: none, or unknown to it
label_name         string                   true class as the data name it; null: none
predicted          string                   name of the likeliest class
predicted_index    int64                    its output
probability        float                    its probability
probabilities      fixed list of float      of all outputs in their order                     (``all``)
top_index          fixed list of int64      the five likeliest outputs, the likeliest first   (``top``)
top_probability    fixed list of float      their probabilities                               (``top``)
=================  =======================  =============================================================

Either ``all`` or ``top``. The schema's metadata hold, under "maekit", a JSON object: "format" (1), "classes" (names of
the outputs; a classifier without names is given numbers) and "probabilities" ("all" or "top").

FILE.csv has the first seven columns, then for ``all`` one for each class, ``p_NAME``, for ``top`` the second to fifth
likeliest, ``top2``, ``top2_probability`` ... A text that a spreadsheet would take for a formula (it begins with
= + - @, a tab or a return) stands behind an apostrophe.
"""

import contextlib
import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from maekit.data.loader import Batch
from maekit.data.sources import Source
from maekit.errors import MaekitError
from maekit.report.files import whole
from maekit.report.tables import harmless, text
from maekit.tasks.streamed import Rows, each_once
from maekit.train.device import World

FORMAT = 1
FILE = "predictions.parquet"
"""In the folder of a fine-tune."""
TOP = 5
MOST_CLASSES = 100
"""Up to so many classes all probabilities are written where nothing is said."""

Kind = Literal["all", "top"]


@dataclass(frozen=True)
class Columns:
    """How a classifier's outputs become rows.

    Attributes:
        num_outputs: of the classifier.
        kind: "all" probabilities, or those of the "top" five.
    """

    num_outputs: int
    kind: Kind

    @staticmethod
    def of(num_outputs: int, asked: Kind | None) -> "Columns":
        """Take what is asked for; by default all of up to `MOST_CLASSES`."""
        return Columns(num_outputs, asked or ("all" if num_outputs <= MOST_CLASSES else "top"))

    @property
    def top(self) -> int:
        """Outputs of "top"."""
        return min(TOP, self.num_outputs)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return 24 + (4 * self.num_outputs if self.kind == "all" else 12 * self.top)

    def rows(self, log_probabilities: Tensor) -> Rows:
        """Return rows of (B, num_outputs); of equally likely outputs the first is the predicted one."""
        logs = log_probabilities.detach().double().cpu()
        # sorted, not topk, whose order of equal values is nobody's
        values, order = torch.sort(logs, stable=True, dim=1, descending=True)
        rows = {"predicted": order[:, 0], "probability": values[:, 0].exp().float()}
        if self.kind == "all":
            return rows | {"probabilities": logs.exp().float()}
        return rows | {
            "top_index": order[:, : self.top].contiguous(),
            "top_probability": values[:, : self.top].exp().float(),
        }

    def none(self) -> Rows:
        """Return the rows of no image."""
        return {"index": torch.zeros(0, dtype=torch.long), **self.rows(torch.zeros(0, self.num_outputs))}


def check_outputs(log_probabilities: Tensor) -> None:
    """Refuse outputs that are no probabilities.

    Raises:
        MaekitError: E-NUM-OUTPUT for NaN and infinity.
    """
    if bool(log_probabilities.isnan().any()):
        raise MaekitError(
            "E-NUM-OUTPUT", "outputs of the classifier", found="NaN or infinity", expected="finite numbers",
            hint="--precision fp32, or maekit data PATH to look at the images",
        )  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What the rows are of: images, names of the outputs, true classes.

    Attributes:
        source: of the images.
        names: of the outputs.
        outputs: for each class of the source its output, None for one that the classifier does not know.
    """

    source: Source
    names: list[str]
    outputs: list[int | None]

    @staticmethod
    def of(source: Source, classes: Sequence[str], num_outputs: int) -> "Truth":
        """Match the classes of the data to the outputs: by name, or by number where the classifier has no names."""
        theirs = list(source.classes or []) if source.labels is not None else []
        if classes:
            known = {name: output for output, name in enumerate(classes)}
            return Truth(source, list(classes), [known.get(name) for name in theirs])
        if len(theirs) == num_outputs:
            return Truth(source, theirs, list(range(num_outputs)))
        return Truth(source, [str(output) for output in range(num_outputs)], [None] * len(theirs))

    @property
    def labelled(self) -> bool:
        """Whether every image has a true class that is the classifier's."""
        return bool(self.outputs) and None not in self.outputs

    @property
    def strange(self) -> list[str]:
        """Names of classes that the classifier does not know."""
        names = zip(self.source.classes or [], self.outputs, strict=False)
        return [name for name, output in names if output is None]

    def label(self, index: int) -> int | None:
        """Return the true output of an image."""
        return None if self.source.labels is None else self.outputs[self.source.labels[index]]

    def label_name(self, index: int) -> str | None:
        """Return the true class of an image as the data name it."""
        return None if self.source.labels is None else (self.source.classes or [])[self.source.labels[index]]


class Kept:
    """Rows of images that are being scored, for ``predictions.parquet`` beside their scores."""

    def __init__(self, answers: Columns) -> None:
        self.answers = answers
        self.rows = [answers.none()]  # a process may have no image

    def __call__(self, batch: Batch, log_probabilities: Tensor) -> None:
        """Keep a batch."""
        self.rows.append({"index": batch["ids"].cpu(), **self.answers.rows(log_probabilities)})

    def write(self, folder: Path, truth: Truth, here: World) -> None:
        """Write the rows of all processes.

        Raises:
            MaekitError: E-ENV-OUT.
        """
        rows = each_once(self.rows, here)
        if here.is_main:
            write_predictions(folder / FILE, self.answers, truth, [rows])


def write_predictions(path: Path, answers: Columns, truth: Truth, parts: Iterable[Rows]) -> None:
    """Write FILE.parquet or FILE.csv part by part; it is whole or absent.

    Raises:
        MaekitError: E-ENV-OUT.
    """
    with whole(path) as place:
        if path.suffix.lower() == ".csv":
            _write_csv(place, answers, truth, parts)
        else:
            _write_parquet(place, answers, truth, parts)


def _write_parquet(place: Path, answers: Columns, truth: Truth, parts: Iterable[Rows]) -> None:
    about = {"format": FORMAT, "classes": truth.names, "probabilities": answers.kind}
    schema = _table(answers, truth, answers.none()).schema.with_metadata({"maekit": json.dumps(about)})
    with pq.ParquetWriter(place, schema) as writer:
        for rows in parts:
            writer.write_table(_table(answers, truth, rows).replace_schema_metadata(schema.metadata))


def identity(source: Source, index: Sequence[int]) -> dict[str, pa.Array]:
    """Return the columns id and path, as every file of rows has them."""
    return {"id": pa.array(index, pa.int64()), "path": pa.array([text(source.ids[i]) for i in index], pa.string())}


def fixed_lists(values: Tensor) -> pa.Array:
    """Return (n, D) as a column of lists of D."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.contiguous().numpy().ravel()), values.shape[1])


def _table(answers: Columns, truth: Truth, rows: Rows) -> pa.Table:
    index = rows["index"].tolist()
    columns: dict[str, Any] = identity(truth.source, index)
    columns["label"] = pa.array([truth.label(i) for i in index], pa.int64())
    columns["label_name"] = pa.array([_text_or_none(truth.label_name(i)) for i in index], pa.string())
    columns["predicted"] = pa.array([text(truth.names[i]) for i in rows["predicted"].tolist()], pa.string())
    columns["predicted_index"] = pa.array(rows["predicted"].numpy())
    columns["probability"] = pa.array(rows["probability"].numpy())
    lists = ("probabilities",) if answers.kind == "all" else ("top_index", "top_probability")
    return pa.table(columns | {name: fixed_lists(rows[name]) for name in lists})


def _text_or_none(name: str | None) -> str | None:
    return None if name is None else text(name)


def _write_csv(place: Path, answers: Columns, truth: Truth, parts: Iterable[Rows]) -> None:
    names = [text(name) for name in truth.names]
    more = (
        [f"p_{name}" for name in names]
        if answers.kind == "all"
        else [word for rank in range(2, answers.top + 1) for word in (f"top{rank}", f"top{rank}_probability")]
    )
    first = ["id", "path", "label", "label_name", "predicted", "predicted_index", "probability"]
    with place.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*first, *more])
        for rows in parts:
            writer.writerows(_lines(answers, truth, rows, [harmless(name) for name in names]))


def _lines(answers: Columns, truth: Truth, rows: Rows, names: list[str]) -> Iterator[list[object]]:
    predicted, sure = rows["predicted"].tolist(), rows["probability"].tolist()
    for at, index in enumerate(rows["index"].tolist()):
        label, label_name = truth.label(index), truth.label_name(index)
        name = harmless(truth.source.ids[int(index)])
        line: list[object] = [index, name, "" if label is None else label, harmless(label_name or "")]
        line += [names[predicted[at]], predicted[at], f"{sure[at]:.7g}"]
        if answers.kind == "all":
            yield line + [f"{value:.7g}" for value in rows["probabilities"][at].tolist()]
            continue
        others = zip(rows["top_index"][at].tolist()[1:], rows["top_probability"][at].tolist()[1:], strict=True)
        yield line + [word for output, value in others for word in (names[output], f"{value:.7g}")]


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of labelled images.

    Attributes:
        images: name and true class of each.
        right: whether its class was the true one.
    """

    images: list[tuple[str, str]]
    right: list[bool]

    def top1(self) -> float:
        """Share of images that it got right."""
        return sum(self.right) / len(self.right)


def read_predictions(path: Path) -> Predictions:
    """Read FILE.parquet back.

    Raises:
        MaekitError: E-CONFIG-RUN if it is none, E-DATA-LABELS if an image has no true class that the classifier has.
    """
    names, columns = ["path", "label_name", "label", "predicted_index"], None
    with contextlib.suppress(pa.ArrowException, OSError, KeyError):
        table = pq.read_table(path, columns=names)
        columns = [table[name].to_pylist() for name in names]
    if columns is None or not columns[0]:
        raise MaekitError(
            "E-CONFIG-RUN", f"{path}", found="no predictions", expected="a .parquet of maekit predict, or a run folder"
        )
    paths, classes, labels, said = columns
    if None in labels:
        raise MaekitError(
            "E-DATA-LABELS", f"{path}", found=f"{labels.count(None)} images without a class that the classifier has",
            expected="a true class of each", hint="maekit predict with labelled images of its classes",
        )  # fmt: skip
    return Predictions(
        list(zip(paths, classes, strict=True)), [label == one for label, one in zip(labels, said, strict=True)]
    )
