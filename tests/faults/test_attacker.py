"""The servers of `make up` and the inspector's page against another site, another host name and another user."""

import base64
import contextlib
import http.client
import http.server
import json
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator

import psutil
import pytest
from playwright.sync_api import expect

from tests.browser import CHROMIUM, PATIENCE, chromium, inspector
from tests.services import NAMES, Services, services

pytestmark = pytest.mark.services

SERVERS = (*NAMES, "inspector")
EVIL = "http://evil.example"
JSON, TEXT = {"Content-Type": "application/json"}, {"Content-Type": "text/plain"}
# What a page can have a browser send: without asking first, after asking, and the asking itself.
ASKED = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
KINDS = [("GET", {}), ("HEAD", {}), ("POST", TEXT), ("POST", JSON), ("PUT", JSON), ("PATCH", JSON), ("DELETE", {})]
KINDS += [("OPTIONS", ASKED)]
PATHS = {
    "prefect": ("/", "/ui-settings", "/docs", "/api/health", "/api/admin/settings", "/api/flow_runs/filter"),
    "mlflow": ("/", "/health", "/version", "/graphql", "/ajax-api/2.0/mlflow/experiments/search"),
    "reports": ("/", "/secret.html"),
    "inspector": ("/", "/about", "/queue", "/answers", "/picture/scores/x/photograph", "/answer", "/undo", "/judge"),
}
SOCKETS = {"prefect": "/api/events/in", "mlflow": "/api/events/in", "reports": "/", "inspector": "/queue"}
COMMAND = {"job_variables": {"command": "touch EXECUTED"}}


@pytest.fixture(scope="module")
def up(tiny_line, tmp_path_factory) -> Iterator[Services]:
    """All of `make up`, and the inspector's page."""
    with services(tmp_path_factory.mktemp("attacked") / "workspace", tiny_line) as here:
        here.up()
        (here.workspace.path / "reports/secret.html").write_text("<html>secret")
        with inspector(here.workspace, "--model", "models/detector") as url:
            here.ports["inspector"] = int(url.rpartition(":")[2])
            yield here


def ask(port: int, method: str, path: str, body: str = "{}", **headers: str) -> tuple[int, dict[str, str], str]:
    """Send exactly these headers. The body goes with what takes one."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        if value is not None:
            connection.putheader(name, value)
    sent = body.encode() if method in ("POST", "PUT", "PATCH") else b""
    connection.putheader("Content-Length", str(len(sent)))
    connection.endheaders(sent)
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode(errors="replace")


def shake_hands(port: int, path: str, **headers: str) -> int:
    """Ask for a WebSocket, and return the status: 101 if it opens."""
    key = base64.b64encode(os.urandom(16)).decode()
    offer = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": key}
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        lines = [f"{name}: {value}" for name, value in {"Host": f"127.0.0.1:{port}", **offer, **headers}.items()]
        connection.sendall("\r\n".join([f"GET {path} HTTP/1.1", *lines, "\r\n"]).encode())
        return int(connection.recv(100).split()[1])


def refused(status: int, headers: dict[str, str], body: str) -> bool:
    opened = any(name.lower().startswith("access-control-allow") for name in headers)
    return 400 <= status < 500 and not opened and "secret" not in body


def foreign(port: int) -> list[dict[str, str]]:
    """What a browser says of a page of another site, of another port, and of no site."""
    said = [{"Origin": origin} for origin in (EVIL, f"{EVIL}:{port}", "null", "http://127.0.0.1:1", "http://localhost")]
    said += [{"Origin": f"https://127.0.0.1:{port}"}, {"Origin": f"http://localhost:{port}"}, {"Origin": ""}]
    for site in ("cross-site", "same-site"):
        said += [{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode} for mode in ("no-cors", "cors")]
        said += [{"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}]
    return said


@pytest.mark.parametrize("server", SERVERS)
def test_a_page_of_another_site_is_refused(up, server):
    port = up.ports[server]
    let_in = [
        (method, path, headers, answer[0])
        for headers in foreign(port)
        for path in PATHS[server]
        for method, more in KINDS
        if not refused(*(answer := ask(port, method, path, **headers, **more)))
    ]
    assert not let_in
    assert all(400 <= shake_hands(port, SOCKETS[server], **headers) < 500 for headers in foreign(port))
    # A form of another site, which leads the browser away from it.
    led = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert all(refused(*ask(port, "POST", path, **led, **TEXT)) for path in PATHS[server])


def names(port: int) -> list[str]:
    """What a browser calls a server by a name that leads to this machine, and other confusion."""
    other = ["evil.example", "127.0.0.1", "127.0.0.1:1", "", f"127.0.0.1:{port}.evil.example"]
    return other + [
        f"{n}:{port}" for n in ("evil.example", "0.0.0.0", "127.1", "127.0.0.1.evil.example", "e@127.0.0.1")
    ]


@pytest.mark.parametrize("server", SERVERS)
def test_another_host_name_is_refused(up, server):
    port = up.ports[server]
    for host in names(port):
        # A page of that name is of the same origin as what it asks for.
        same = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        for headers in ({"Host": host}, same, {"X-Forwarded-Host": f"127.0.0.1:{port}", **same}):
            for path in PATHS[server]:
                assert refused(*ask(port, "GET", path, **headers)), (headers, path)
                assert refused(*ask(port, "POST", path, **headers, **JSON)), (headers, path)
            assert 400 <= shake_hands(port, SOCKETS[server], **headers) < 500


def test_no_program_without_the_password_runs_a_command(up):
    with up.client() as client:
        deployment = client.read_deployment_by_name("retrain/retrain").id
        before = len(client.read_flow_runs())
    port, password = up.ports["prefect"], up.connection["PREFECT_API_AUTH_STRING"]
    path, body = f"/api/deployments/{deployment}/create_flow_run", json.dumps(COMMAND)
    known, other = (base64.b64encode(text.encode()).decode() for text in (password, "vlmdiff:" + "x" * 43))
    for headers in ({}, {"Authorization": f"Basic {other}"}, {"Authorization": f"Bearer {password}"}):
        for kind in (TEXT, JSON):
            assert ask(port, "POST", path, body, **headers, **kind)[0] in (401, 403)
        assert ask(port, "GET", f"/api/deployments/{deployment}", **headers)[0] == 401
    # The password alone does not do for a page that a browser is led to: it needs a token that it cannot read.
    assert ask(port, "POST", path, body, Authorization=f"Basic {known}", **JSON)[0] == 403
    with up.client() as client:
        assert len(client.read_flow_runs()) == before
    assert not list(up.workspace.path.rglob("EXECUTED"))


def test_the_password_is_only_the_users(up):
    file = up.workspace.path / ".cache/servers/password"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and len(file.read_text()) > 40
    assert file.name not in up.workspace.run("git", "status", "--short", "--untracked-files=all").stdout
    commands = " ".join(" ".join(process.info["cmdline"] or []) for process in up.processes())
    assert file.read_text() not in commands
    logs = "".join(log.read_text() for log in file.parent.glob("*.log"))
    assert file.read_text() not in logs
    file.chmod(0o644)
    command = (sys.executable, "-m", "flows.servers", "up")
    said = up.workspace.run(*command, check=False, **up.environment)
    file.chmod(0o600)
    assert said.returncode == 2 and "password may be read by other users" in said.stdout


ANOTHER_USER = """
import encodings.idna, http.client, os, sys
os.setuid(65534)
forwarded = [{"X-Forwarded-For": address} for address in ("127.0.0.1", "8.8.8.8")]
for port in sys.argv[1:]:
    for headers in ({}, {"Sec-Fetch-Site": "same-origin"}, *forwarded):
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        connection.request("GET", "/", headers=headers)
        print(connection.getresponse().status)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_is_refused(up):
    ports = [str(up.ports[server]) for server in SERVERS]
    done = subprocess.run([sys.executable, "-c", ANOTHER_USER, *ports], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"403"} and len(done.stdout.split()) == 4 * len(SERVERS)


def test_nothing_else_listens_and_nothing_beyond_this_machine(up):
    found = {
        connection.laddr
        for process in up.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address for address, _ in found} == {"127.0.0.1"}
    # The worker listens for its runs, which show a token that they are given.
    assert {up.ports[server] for server in SERVERS} <= {port for _, port in found} and len(found) == len(SERVERS) + 1


# A page of another site that tries what a page can. Its title says that it has tried.
ATTACK = """
<script>
const ports = PORTS, found = [];
const say = (what, went) => { if (went) found.push(what) };
async function attack(port) {
  for (const path of ['/', '/api/health', '/api/flow_runs/filter', '/ajax-api/2.0/mlflow/registered-models/create',
      '/queue', '/answer']) {
    const url = `http://127.0.0.1:${port}${path}`;
    for (const options of [{}, {mode: 'no-cors'}, {method: 'POST', body: '{"name": "evil"}', mode: 'no-cors'},
        {method: 'POST', body: '{"name": "evil"}', headers: {'Content-Type': 'application/json'}},
        {method: 'DELETE', credentials: 'include'}])
      await fetch(url, options).then(answer => say([url, options.method], answer.type != 'opaque')).catch(() => 0);
    for (const tag of ['img', 'script', 'iframe', 'object']) {
      const element = document.createElement(tag);
      element[tag == 'object' ? 'data' : 'src'] = url;
      document.body.append(element);
    }
  }
  for (const path of ['/api/events/in', '/queue'])
    await new Promise(done => {
      const socket = new WebSocket(`ws://127.0.0.1:${port}${path}`, ['prefect']);
      socket.onopen = () => { say([port, path], true); done() };
      socket.onerror = done;
    });
}
addEventListener('load', async () => {
  for (const port of ports) await attack(port);
  document.title = JSON.stringify(found);
});
</script><body>evil
"""


@contextlib.contextmanager
def another_site(page: str) -> Iterator[int]:
    """A web server of this machine that is none of ours."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    expect.set_options(timeout=PATIENCE)
    with chromium("--host-resolver-rules=MAP evil.example 127.0.0.1") as browser:
        yield browser


def test_a_browser_on_a_page_of_another_site_gets_nothing(up, page):
    ports = [up.ports[server] for server in SERVERS]
    answers = []
    page.on("response", lambda answer: answers.append((answer.url, answer.status)))
    with another_site(ATTACK.replace("PORTS", json.dumps(ports))) as port:
        for site in (f"{EVIL}:{port}/", f"http://localhost:{port}/"):
            answers.clear()
            page.goto(site)
            page.wait_for_function("document.title", timeout=3 * PATIENCE)
            assert page.title() == "[]"
            came = [(url, status) for url, status in answers if url != site and "favicon" not in url]
            assert len(came) > 40 and not [(url, status) for url, status in came if not 400 <= status < 500]


def test_a_browser_that_another_name_leads_to_a_server_gets_nothing(up, page):
    for server in SERVERS:
        answer = page.goto(f"{EVIL}:{up.ports[server]}/")
        assert answer.status == 403 and "host name" in page.content()


def test_the_users_browser_needs_no_step_more(up, page):
    ports = up.ports
    for host in ("127.0.0.1", "localhost"):
        page.goto(f"http://{host}:{ports['prefect']}")
        expect(page.get_by_text("Active Work Pools")).to_be_visible()
        page.goto(f"http://{host}:{ports['prefect']}/v2/deployments")
        page.get_by_role("link", name="retrain").first.click()
        switch = page.get_by_role("switch").first
        before = switch.get_attribute("aria-checked")
        switch.click()
        expect(switch).not_to_have_attribute("aria-checked", before)
        with up.client() as client:
            (schedule,) = client.read_deployment_by_name("retrain/retrain").schedules
        assert str(schedule.active).lower() == switch.get_attribute("aria-checked")
        page.goto(f"http://{host}:{ports['mlflow']}")
        expect(page.get_by_text("Experiments").first).to_be_visible()
        # A link from a page of one server to another's.
        page.evaluate("url => { location = url }", f"http://{host}:{ports['reports']}/secret.html")
        expect(page.get_by_text("secret")).to_be_visible()
        page.goto(f"http://{host}:{ports['inspector']}")
        expect(page.locator("#empty")).to_be_visible()
