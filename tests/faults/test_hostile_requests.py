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
from vlmdiff.core.network import NOBODY, owner, refusal


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


ELSEWHERE = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
]


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
def test_a_report_is_not_served_to_a_page_of_another_site(reports, headers):
    status, body = get(reports, "/gate.html", **headers)
    assert status == 403 and "the gate" not in body


def test_a_link_of_another_site_opens_a_report(reports):
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert get(reports, "/gate.html", **followed)[0] == 200


# How a server that listens beyond this machine may be called.
@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("10.0.0.3:8501", True),
        ("192.168.0.7", True),
        ("[fe80::1]:8501", True),
        ("factory:8501", True),
        (f"{socket.gethostname()}:8501", True),
        ("evil.example:8501", False),
        ("10.0.0.3.evil.example:8501", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_a_server_beyond_this_machine_answers_to_no_name_that_somebody_can_register(host, is_ours):
    why = refusal("GET", [("Host", host)], ("10.0.0.9", 50_000), ("10.0.0.3", 8501))
    assert (why is None) == is_ours


def test_the_user_at_the_other_end_of_a_connection_is_known_while_it_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        client = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()
        ends = client.getsockname(), server.getsockname()
        assert owner(*ends) in (os.getuid(), None)
        client.close()
        assert owner(*ends) in (NOBODY, None)
        accepted.close()
