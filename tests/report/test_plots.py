import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from maekit.report.plots import MAX_POINTS, _carried, bars, curves, lines, smooth


def records(count: int = 100, ratio: float = 0.97) -> list[dict[str, float]]:
    return [
        {"step": 10 * i, "epoch": i / 8, "loss": ratio**i + 0.01 * (i % 3), "lr": 1e-3 * (1 - i / count), "time": i}
        for i in range(1, count + 1)
    ]


def words(svg: str) -> str:
    return " ".join(
        " ".join(text.itertext()) for text in ElementTree.fromstring(svg).iter() if text.tag.endswith("text")
    )


def test_curves_show_loss_and_learning_rate_against_epochs_as_text() -> None:
    text = words(curves(records()))
    assert "loss (log scale)" in text and "learning rate" in text and "epoch" in text and "moving mean" in text


def test_a_loss_that_hardly_falls_has_a_plain_axis() -> None:
    assert "log scale" not in words(curves(records(ratio=0.999)))


def test_scores_get_a_panel_of_their_own_at_the_epoch_of_their_step() -> None:
    assert "val/top1" in words(curves([*records(), {"step": 1000, "val/top1": 0.8}]))
    scored = [{"step": 10, "val/top1": 0.1}, {"step": 20, "val/top1": 0.2}, {"step": 40, "epoch": 2.0, "loss": 1.0}]
    assert [record["epoch"] for record in _carried(scored)] == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "time": 0.1}],
        [{"step": 1, "epoch": 0.1, "loss": math.nan, "lr": math.inf}],
        [{"step": 1, "loss": None}],
    ],
)
def test_nothing_to_draw_gives_nothing(metrics: list[dict[str, float]]) -> None:
    assert curves(metrics) == ""


def test_one_record_is_a_dot_and_a_loss_of_zero_or_below_is_drawn() -> None:
    assert "<svg" in curves(records(1))
    assert "loss" in words(curves([{"step": i, "epoch": i, "loss": 1 - i} for i in range(4)]))


def test_equal_data_give_equal_text_without_date_or_software() -> None:
    svg = curves(records())
    assert svg == curves(records())
    assert "metadata" not in svg and "Matplotlib" not in svg and "<style" not in svg and "<!--" not in svg


def test_drawings_take_the_colour_of_the_page_so_they_read_on_dark() -> None:
    svg = curves(records()) + bars({"a": {"b": [1.0, 2.0]}})
    assert "currentColor" in svg and "#010203" not in svg and "#000000" not in svg and "#ffffff" not in svg


def test_ids_of_two_drawings_in_one_page_do_not_clash_and_every_reference_has_its_target() -> None:
    ids: list[str] = []
    for svg in (curves(records()), curves(records(50)), bars({"a": {"b": [1.0, 2.0]}})):
        own = {element.get("id") for element in ElementTree.fromstring(svg).iter()} - {None}
        links = {e.get("href", "")[1:] for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("use")}
        assert links and links <= own
        ids += [name for name in own if name]
    assert len(ids) == len(set(ids))


def test_long_runs_are_thinned_to_means() -> None:
    assert len(curves(records(100_000, 0.9999))) < 150_000
    assert len(curves(records(MAX_POINTS * 3, 0.999))) < 150_000


def test_the_moving_mean_does_not_lag_and_keeps_a_straight_line() -> None:
    line = np.arange(200.0)
    np.testing.assert_allclose(smooth(line), line)
    assert smooth(np.array([3.0])).tolist() == [3.0]


def test_bars_tell_mean_and_spread_and_draw_one_dot_per_seed() -> None:
    svg = bars({"10 labels a class": {"from MAE": [0.657, 0.698, 0.637], "from scratch": [0.607, 0.645, 0.6]}})
    text = words(svg)
    assert "0.664 ± 0.031" in text and "0.617 ± 0.024" in text and "10 labels a class" in text and "from MAE" in text
    assert bars({}) == bars({"a": {}}) == bars({"a": {"b": []}}) == ""
    assert "0.500" in words(bars({"": {"one seed": [0.5]}})) and "±" not in words(bars({"": {"one seed": [0.5]}}))


def test_hostile_names_are_text_and_never_markup_or_mathematics() -> None:
    name = "</text><script>x</script> $\\frac{ --> 漢字"
    svg = bars({name: {name: [0.1, 0.2]}}, label=name)
    assert "<script" not in svg and "<!--" not in svg
    assert "<script>" in words(svg)


def test_lines_name_every_series_and_say_their_values() -> None:
    text = lines({"10% mean": ([1, 2, 3], [0.1, 0.2, 0.25]), "100% <cls>": ([3], [0.5])}, x="block")
    assert text.startswith("<svg") and "0.250 at 3" in text and "block" in text and "<cls>" not in text
    assert lines({}, x="block") == lines({"a": ([], [])}, x="block") == ""
    assert text == lines({"10% mean": ([1, 2, 3], [0.1, 0.2, 0.25]), "100% <cls>": ([3], [0.5])}, x="block")
