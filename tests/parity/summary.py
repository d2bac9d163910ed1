"""Prints which golden files have no adapter yet; they are neither failures nor skips."""

from tests.parity.runner import split_files


def pytest_terminal_summary(terminalreporter):
    ran = any(
        "parity" in report.nodeid
        for reports in terminalreporter.stats.values()
        for report in reports
        if hasattr(report, "nodeid")
    )
    if not ran:
        return
    done, missing = split_files()
    terminalreporter.write_line(f"parity: {len(done)} golden files checked, {len(missing)} not implemented")
    for path in missing:
        terminalreporter.write_line(f"  not implemented: {path.name.removesuffix('.safetensors')}")
