"""The server of reports/ against pages of other sites and files that lead elsewhere."""

import http.client
import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.processes import wait_for
from tests.services import free_ports


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """The server's port, as `make up` starts it."""
    place, (port,) = tmp_path_factory.mktemp("place"), free_ports(1)
    (place / "reports/deep").mkdir(parents=True)
    (place / "reports/gate.html").write_text("<html>the gate")
    (place / "reports/deep/page.html").write_text("<html>deep")
    (place / "secret").mkdir()
    (place / "secret/key.html").write_text("secret")
    (place / "reports/file.html").symlink_to(place / "secret/key.html")
    (place / "reports/folder").symlink_to(place / "secret")
    (place / "reports/endless.html").symlink_to("/dev/zero")
    os.mkfifo(place / "reports/pipe.html")
    command = [sys.executable, "-m", "flows.servers", "reports", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, cwd=place, env=environment, stderr=subprocess.DEVNULL)

    def answers() -> bool:
        assert server.poll() is None
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers, 60)
    yield port
    server.terminate()
    server.wait()


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("GET", path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


@pytest.mark.parametrize("path", ["/gate.html", "/deep/page.html", "/deep/"])
def test_a_report_is_served(reports, path):
    for host in ("127.0.0.1", "localhost"):
        assert get(reports, path, Host=f"{host}:{reports}")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:80", "0.0.0.0:{port}", ""]
)
def test_a_report_is_not_served_to_another_host_name(reports, host):
    status, body = get(reports, "/gate.html", Host=host.format(port=reports))
    assert status == 403 and "the gate" not in body


OUTSIDE = ["/file.html", "/folder/key.html", "/folder/", "/../secret/key.html", "/%2e%2e/secret/key.html"]
NO_FILES = ["/endless.html", "/pipe.html"]


@pytest.mark.parametrize("path", [*OUTSIDE, *NO_FILES])
def test_nothing_outside_of_the_reports_is_served(reports, path):
    status, body = get(reports, path)
    assert status == 404 and "secret</" not in body and body != "secret"
