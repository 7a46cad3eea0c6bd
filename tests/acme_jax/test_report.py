"""The report and the tables say what the numbers say."""

import copy
import io
import re
from html.parser import HTMLParser

import fake_results
import pytest
from rich.console import Console

from acme_jax import report, tables, wording

RESULTS, TIMING = fake_results.make_results(), fake_results.make_timing()


def with_accuracy(**accuracies):
    """Results of three devices with the given accuracies by method, and their summary."""
    results = copy.deepcopy(RESULTS)
    results["devices"] = results["devices"][:3]
    for place, device in enumerate(results["devices"]):
        device["accuracy"] = {name: values[place] for name, values in accuracies.items()}
    results["summary"] = {
        name: {"mean": sum(values) / 3, "std": 0.01, "worst_tenth": min(values)}
        for name, values in accuracies.items()
    }
    return results


class Checker(HTMLParser):
    """Collects what would be fetched, and checks that elements close in order."""

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = report.write_report(
        RESULTS, TIMING, tmp_path_factory.mktemp("run"), {"seed": 0}, "load('<x>')"
    )
    return path.read_text(encoding="utf-8")


def test_page_is_self_contained_and_well_formed(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.sources) == 7
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert "script" not in checker.tags and "link" not in checker.tags
    assert "url(" not in page and "@import" not in page


def test_page_shows_every_device_and_escapes_text(page):
    for device in RESULTS["devices"]:
        assert f'<td class="text">{device["device"]}</td>' in page
    assert "load(&#x27;&lt;x&gt;&#x27;)" in page
    assert "9f2c01d4e5a67b88" in page and "0123abc" in page


@pytest.mark.parametrize("missing", list(RESULTS))
def test_report_without_one_part(tmp_path, missing, monkeypatch):
    monkeypatch.setattr(report, "write_plots", lambda results, directory: {})
    results = {key: value for key, value in RESULTS.items() if key != missing}
    report.write_report(results, {}, tmp_path)


def test_empty_results(tmp_path):
    assert report.headlines({}, {}) == []
    report.write_report({}, {}, tmp_path)


def test_headline_when_acme_wins_clearly():
    text = " ".join(
        report.headlines(
            with_accuracy(no_pruning=[0.8, 0.8, 0.8], wasserstein=[0.9, 0.91, 0.89]), {}
        )
    )
    assert "the best mean of 2 methods" in text
    assert "ACME gains 10.0 points" in text and "3 devices are better, 0 worse, 0 equal" in text
    assert "within the spread" not in text


def test_headline_when_a_baseline_is_better():
    results = with_accuracy(
        no_pruning=[0.95, 0.95, 0.96], alone=[0.9, 0.93, 0.9], wasserstein=[0.9, 0.9, 0.9]
    )
    text = " ".join(report.headlines(results, {}))
    assert 'place 3 of 3 methods: "no pruning" is better with 95.3 %, 5.3 points ahead' in text
    assert "more than the spread" in text
    assert 'ACME loses 5.3 points against "no pruning"' in text


def test_headline_within_the_spread():
    results = with_accuracy(no_pruning=[0.9, 0.9, 0.9], wasserstein=[0.95, 0.85, 0.93])
    text = " ".join(report.headlines(results, {}))
    assert "1.0 points behind (within the spread)" in text
    assert "2 devices are better, 1 worse, 0 equal" in text
    assert "so it is within the spread" in text


def test_headline_of_a_tie():
    results = with_accuracy(no_pruning=[0.9, 0.8, 0.7], wasserstein=[0.9, 0.8, 0.7])
    text = " ".join(report.headlines(results, {}))
    assert 'shared with "no pruning"' in text and "changes nothing" in text


def test_headline_bytes_tell_when_acme_sends_more():
    up, down = (s for s in report.headlines(RESULTS, {}) if s.startswith(("Up", "Down")))
    assert "26.3 %" in up and "more" not in up
    assert "119 %" in down and "ACME sends more" in down


def test_compare_against_plain_arithmetic():
    result = wording.compare(with_accuracy(a=[0.5, 0.6, 0.7], b=[0.5, 0.5, 0.9]), "a", "b")
    assert result.mean == pytest.approx(-0.1 / 3)
    assert result.spread == pytest.approx(0.12472191)
    assert (result.better, result.worse, result.equal) == (1, 1, 1)
    assert result.within_spread
    assert wording.compare(RESULTS, "wasserstein", "absent") is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "B", "0 B"), (90, "B", "90 B"), (123_456, "B", "123 kB"), (999_600, "B", "1 MB"),
        (1_205_288, "B", "1.21 MB"), (0.00412, "s", "4.12 ms"), (6.9e-6, "J", "6.9 µJ"),
        (None, "B", "–"), (0.5, "B", "0.5 B"), (1e15, "FLOP", "1000 TFLOP"),  # noqa: RUF001
    ],
)  # fmt: skip
def test_quantity(value, unit, text):
    assert wording.quantity(value, unit) == text


def test_columns_share_a_unit():
    assert wording.column([362_000, 1_205_288, None], "B") == ("kB", ["362", "1205", "–"])  # noqa: RUF001
    assert wording.column([0.0127, 0.018], "s") == ("ms", ["12.7", "18.0"])
    assert wording.column([], "s") == ("s", [])


def test_traffic_table_adds_up():
    rows = [row for row in tables.traffic_table(RESULTS).rows if row[0] != "all"]
    for direction in ("up", "down"):
        total = sum(int(row[4].replace(",", "")) for row in rows if row[1] == direction)
        assert total == RESULTS["traffic"][f"{direction}link_bytes"]


def test_methods_in_their_order_and_unknown_ones_last():
    present = dict.fromkeys(["mystery", "wasserstein", "avg", "linear"])
    assert wording.method_names(present) == ["linear", "avg", "wasserstein", "mystery"]
    assert wording.method("mystery").label == "mystery"


def printed(results=RESULTS, timing=TIMING, **options):
    stream = io.StringIO()
    tables.print_results(results, timing, Console(file=stream, **options))
    return stream.getvalue()


def test_terminal_tables_fit_120_columns():
    text = printed(width=120)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120
    for device in RESULTS["devices"]:
        accuracy = wording.percent(device["accuracy"]["wasserstein"])
        assert re.search(rf"^{device['device']} .*{re.escape(accuracy)} *$", text, re.MULTILINE)
    assert "…" not in text


def test_output_to_a_file_is_plain_and_complete():
    assert printed() == printed(width=120)
    assert "\x1b" not in printed()


def test_printing_nothing():
    assert printed({}, {}) == ""
