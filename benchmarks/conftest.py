"""Options of the benchmarks that pytest runs."""


def pytest_addoption(parser):
    parser.addoption(
        "--shapes",
        metavar="DIR",
        help="where `python benchmarks/shapes.py NAME DIR` wrote models, whose steps are timed too",
    )
