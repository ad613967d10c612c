"""The fault suite: each test does to the program what the world does, and is a row of docs/reliability.md.

    @pytest.mark.fault("kill -9 at a random moment of {verb}", promise="the resumed run ends with the same bits")

One row a sentence: `{verb}` is the test's parameter of that name, so the cases of a parametrised test are one row where
their sentences are the same and several where they differ. A test that tries its fault n times says so by
`record_property("tried", n)`. `--all_faults` runs the slow ones as well, `--reliability FILE` writes the table; a part
of the suite writes its own rows and leaves the others.
"""

from collections import defaultdict
from pathlib import Path

import pytest
from harness import train
from helpers import draw_users

HERE = Path(__file__).parent
BEGIN, END = "<!-- the table: written by make faults -->", "<!-- end of the table -->"
HEAD = "| area | fault | promised | tried | what happened |\n|---|---|---|---|---|\n"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Two users with five images each; nothing may be written among them."""
    return draw_users(tmp_path_factory.mktemp("data"), ["user_00", "user_01"], 5)


@pytest.fixture(scope="session")
def straight(data, tmp_path_factory):
    """A training that nothing happened to."""
    out = tmp_path_factory.mktemp("straight")
    train(data, out)
    return out


def pytest_addoption(parser):
    parser.addoption("--all_faults", action="store_true", help="run the slow faults as well")
    parser.addoption("--reliability", metavar="FILE", help="write the table of faults between the marks of FILE")


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(what, promise): one row of docs/reliability.md")
    config.stash[Rows.key] = rows = Rows()
    config.pluginmanager.register(rows)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leaves the slow faults out unless they are asked for, and puts each row's words where reports carry them."""
    for item in [item for item in items if item.path.is_relative_to(HERE)]:
        if mark := item.get_closest_marker("fault"):
            words = getattr(item, "callspec", None) and item.callspec.params or {}
            row = [cell(text.format(**words)) for text in (mark.args[0], mark.kwargs["promise"])]
            item.user_properties.append(("fault", row))
            config.stash[Rows.key].place.setdefault(tuple(row), item.location[:2])
        if item.get_closest_marker("slow") and not config.getoption("--all_faults", False):
            items.remove(item)
            config.hook.pytest_deselected(items=[item])


def pytest_sessionfinish(session):
    file = session.config.getoption("--reliability", None)
    if file and not hasattr(session.config, "workerinput"):
        path = session.config.rootpath / file
        before, _, rest = path.read_text().partition(BEGIN)
        old, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}\n{HEAD}{session.config.stash[Rows.key].table(old)}{END}{after}")


def cell(text):
    """Words as they stand in a table."""
    return " ".join(text.split()).replace("|", "/")


class Rows:
    """What the reports say of each row, whichever process ran it."""

    key = pytest.StashKey()

    def __init__(self):
        self.reports, self.place = defaultdict(list), {}

    def pytest_runtest_logreport(self, report):
        words = dict(report.user_properties)
        if "fault" in words and (report.when == "call" or not report.passed):
            row = tuple(words["fault"])
            self.reports[row].append(report)
            self.place[row] = min(report.location[:2], self.place.get(row, report.location[:2]))

    def table(self, old):
        """The rows that ran, in the order of the tests; of a part of the suite in the order of an old table, in which
        the others stay."""
        ran = {row: self.line(*row) for row in sorted(self.reports, key=lambda row: (self.place[row], row))}
        files = {Path(file).name for file, _ in self.place.values()}
        if files == {path.name for path in HERE.glob("test_*.py")} and ran.keys() >= self.place.keys():
            return "".join(ran.values())
        kept = {tuple(line.split(" | ")[1:3]): f"{line}\n" for line in old.splitlines() if line.startswith("| ")}
        kept.pop(tuple(HEAD.split(" | ")[1:3]), None)
        return "".join(sorted((kept | ran).values(), key=lambda line: line.split(" | ")[0]))

    def line(self, what, promise):
        reports = self.reports[what, promise]
        area = Path(reports[0].location[0]).stem.removeprefix("test_").replace("_", " ").capitalize()
        tried = sum(dict(report.user_properties).get("tried", 1) for report in reports if report.when == "call")
        ends = "; ".join(sorted({end(report) for report in reports}))
        return f"| {area} | {what} | {promise} | {tried} | {cell(ends)} |\n"


def end(report):
    if hasattr(report, "wasxfail"):
        return f"not yet: {report.wasxfail.removeprefix('reason: ')}"
    if report.skipped:
        return f"not tried: {report.longrepr[-1].removeprefix('Skipped: ')}"
    crash = getattr(report.longrepr, "reprcrash", None)
    return "as promised" if report.passed else f"FAILED: {crash.message.splitlines()[0] if crash else report.longrepr}"
